package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cmd is an exec.Cmd that starts inside a namespace, as the leader of a process group of its own. Use its methods, not
// those of a copy of the exec.Cmd inside.
type Cmd struct {
	*exec.Cmd
	lab  *Lab
	in   *Namespace
	wait func() error // waits once, whoever calls
	done chan struct{}
}

// Command prepares a program to be run in a namespace of the lab; nil means the initial one. Cancelling ctx kills its
// process group, and so does closing the lab. The group's members are found also after they left the group, by the
// namespace they are in or by MISTNET_LAB in their environment.
func (l *Lab) Command(ctx context.Context, in *Namespace, name string, arg ...string) *Cmd {
	c := &Cmd{Cmd: exec.CommandContext(ctx, name, arg...), lab: l, in: in, done: make(chan struct{})}
	c.Env = append(os.Environ(), envLab+"="+l.ID)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { c.kill(); return nil }
	c.WaitDelay = 5 * time.Second // for output pipes that a grandchild holds open
	c.wait = sync.OnceValue(func() error {
		defer close(c.done)
		return c.Cmd.Wait()
	})
	return c
}

// Start starts the program and does not wait for it.
func (c *Cmd) Start() error {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	if c.lab.closed {
		return errors.New("start command: lab is closed")
	}
	start := c.Cmd.Start
	if c.in != nil {
		start = func() error { return c.in.Do(c.Cmd.Start) }
	}
	if err := start(); err != nil {
		return err
	}
	c.lab.commands[c] = struct{}{}
	return nil
}

// Wait waits for the program to end. It may be called several times and by several goroutines.
func (c *Cmd) Wait() error {
	if c.Process == nil {
		return errors.New("wait for command: not started")
	}
	err := c.wait()
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	delete(c.lab.commands, c)
	return err
}

// Run starts the program and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// CombinedOutput runs the program and returns what it printed.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var b bytes.Buffer
	c.Stdout, c.Stderr = &b, &b
	err := c.Run()
	return b.Bytes(), err
}

// Output runs the program and returns its standard output; what it wrote to standard error is part of the error.
func (c *Cmd) Output() ([]byte, error) {
	var out, errOut bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &errOut
	}
	err := c.Run()
	if err != nil && errOut.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out.Bytes(), err
}

// Stop asks the program to end, and kills its process group after grace. It returns how the program ended.
func (c *Cmd) Stop(grace time.Duration) error {
	if c.Process == nil {
		return errors.New("stop command: not started")
	}
	_ = c.Process.Signal(unix.SIGTERM) // it may have ended already
	timer := time.AfterFunc(grace, c.kill)
	defer timer.Stop()
	return c.Wait()
}

// Kill kills the program's process group at once and waits for the program.
func (c *Cmd) Kill() error {
	if c.Process == nil {
		return errors.New("kill command: not started")
	}
	c.kill()
	return c.Wait()
}

// kill signals the group unless its leader has been waited for: then the number may be somebody else's.
func (c *Cmd) kill() {
	select {
	case <-c.done:
	default:
		_ = unix.Kill(-c.Process.Pid, unix.SIGKILL)
	}
}

// processes lists those that belong to a lab: by their network namespace, or by the mark in their environment. This
// process is never among them.
func processes(id string, inodes map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() && belongs(pid, id, inodes) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// belongs is false for processes that ended: they are in no namespace.
func belongs(pid int, id string, inodes map[uint64]bool) bool {
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) != nil {
		return false
	}
	if inodes[st.Ino] {
		return true
	}
	if id == "" {
		return false
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return err == nil && bytes.Contains(append([]byte{0}, env...), []byte("\x00"+envLab+"="+id+"\x00"))
}

func killInside(inodes map[uint64]bool) error { return killLab("", inodes) }

// killLab kills until nothing is left, for what is killed may have started something meanwhile.
func killLab(id string, inodes map[uint64]bool) error {
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		pids, err := processes(id, inodes)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v survive being killed", pids)
		}
		for _, pid := range pids {
			killOne(pid, id, inodes)
		}
		<-tick.C
	}
}

// killOne looks again once it holds the process: the number may have gone to another one.
func killOne(pid int, id string, inodes map[uint64]bool) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if belongs(pid, id, inodes) {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}
