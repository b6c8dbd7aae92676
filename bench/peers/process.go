package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// stopGrace is how long a process has to obey SIGTERM.
const stopGrace = 3 * time.Second

// Process is a program started in a network namespace.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when the process has been waited for
	err  error         // readable after done
}

// command builds argv to run inside the namespace at path netns; "" is our own.
func command(netns string, argv ...string) *exec.Cmd {
	if netns != "" {
		argv = append([]string{"nsenter", "--net=" + netns, "--"}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	// Its own group, so that an interrupt from the terminal reaches only us; and it ends when we do, even when we are killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	return cmd
}

// Program is something to start in a network namespace.
type Program struct {
	NetNS string // path; "" is our own namespace
	Log   string // file its output goes to
	Dir   string // where it runs; "" is our own folder
	Env   []string
	Argv  []string
}

// Spawn starts p. It does not wait for the program to be ready.
func Spawn(ctx context.Context, p Program) (*Process, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	out, err := os.Create(p.Log)
	if err != nil {
		return nil, err
	}
	defer out.Close() // the child has its own copy
	cmd := command(p.NetNS, p.Argv...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir, cmd.Env = p.Dir, append(os.Environ(), p.Env...)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return watch(cmd, p.Log), nil
}

// Talk starts argv inside the namespace with pipes on its standard input and output. Closing in is how it is told to end.
func Talk(netns, log string, argv ...string) (p *Process, in io.WriteCloser, out io.Reader, err error) {
	cmd := command(netns, argv...)
	stderr, err := os.Create(log)
	if err != nil {
		return nil, nil, nil, err
	}
	defer stderr.Close()
	cmd.Stderr = stderr
	if in, err = cmd.StdinPipe(); err != nil {
		return nil, nil, nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	defer w.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		r.Close()
		return nil, nil, nil, err
	}
	return watch(cmd, log), in, r, nil
}

func watch(cmd *exec.Cmd, log string) *Process {
	p := &Process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() { // ends with the process, which Stop sees to
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p
}

// PID is the program's process id: nsenter becomes the program, it does not fork.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited returns nil while the process runs, and afterwards an error with the end of its log.
func (p *Process) Exited() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended: %v: %s", p.cmd.Args, p.err, tail(p.log))
	default:
		return nil
	}
}

// Stop ends the process and waits for it: SIGTERM, and SIGKILL when that is not obeyed. One that has ended already is fine.
func (p *Process) Stop() error {
	if p.Exited() != nil {
		return nil
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(stopGrace):
	}
	// The group takes along the workers of a master that did not get to end them.
	if err := syscall.Kill(-p.PID(), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	<-p.done
	return nil
}

func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	text = bytes.TrimSpace(text)
	if len(text) > 600 {
		text = text[len(text)-600:]
	}
	return string(text)
}

// inNS runs a short command to its end inside a namespace.
func inNS(ctx context.Context, netns string, argv ...string) error {
	_, err := Output(ctx, netns, argv...)
	return err
}

// Output runs a short command inside a namespace and returns what it printed, both streams.
func Output(ctx context.Context, netns string, argv ...string) (string, error) {
	if netns != "" {
		argv = append([]string{"nsenter", "--net=" + netns, "--"}, argv...)
	}
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, text)
	}
	return text, nil
}

// find returns the path of a program, or an error that wraps ErrAbsent and names the Debian package.
func find(program, pkg string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("%s: %w (apt-get install %s)", program, ErrAbsent, pkg)
	}
	return path, nil
}

// installed finds a program, and what it prints first when it is asked for its version by that flag.
func installed(ctx context.Context, program, pkg, flag string) (bin, version string, err error) {
	if bin, err = find(program, pkg); err != nil {
		return "", "", err
	}
	version, err = Output(ctx, "", bin, flag)
	version, _, _ = strings.Cut(version, "\n")
	return bin, version, err
}

// writeConfigs writes files by their paths.
func writeConfigs(files map[string]string) error {
	for path, text := range files {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}
