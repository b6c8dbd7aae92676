package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mistnet/mistnet/internal/netlab"
)

// DefaultStateDir holds one directory per lab, a tmpfs each.
const DefaultStateDir = "/run/mistnet-e2e"

const stateFile = "lab.json"

// state is what a lab writes down for those who find it later.
type state struct {
	Name        string
	PID         int    // of the process that made it
	Started     uint64 // that process's start in clock ticks since boot: PIDs are used again
	Keep        bool   // it outlives that process
	Nodes       int
	DualStack   bool
	ProxyMode   string
	MachineLink bool
	Binaries    Binaries

	dir string
}

func (s *state) write() error {
	raw, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(s.dir, "."+stateFile)
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(s.dir, stateFile))
}

// orphan reports whether nobody will close the lab: the process that made it is gone, and was not to be outlived.
func (s *state) orphan() bool {
	started, err := netlab.ProcessStart(s.PID)
	return !s.Keep && (err != nil || started != s.Started)
}

func readState(stateDir, name string) (*state, error) {
	s := &state{dir: filepath.Join(stateDir, name)}
	raw, err := os.ReadFile(filepath.Join(s.dir, stateFile))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, fmt.Errorf("read state of lab %s: %w", name, err)
	}
	return s, nil
}

// Names lists the labs in stateDir, also those half made or half removed. "" is DefaultStateDir.
func Names(stateDir string) ([]string, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	entries, err := os.ReadDir(stateDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Sweep removes the labs that nobody will close, as a killed test leaves them. Start calls it.
func Sweep(ctx context.Context, stateDir string) error {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	names, err := Names(stateDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		s, err := readState(stateDir, name)
		if errors.Is(err, fs.ErrNotExist) {
			// Between the directory and its state file lies an instant.
			if fi, err := os.Stat(filepath.Join(stateDir, name)); err != nil || time.Since(fi.ModTime()) < time.Minute {
				continue
			}
			s = &state{Name: name, dir: filepath.Join(stateDir, name)}
		} else if err != nil {
			errs = append(errs, err)
			continue
		}
		if s.orphan() {
			errs = append(errs, remove(ctx, s))
		}
	}
	return errors.Join(errs...)
}

// remove takes a lab down, knowing only its name: whatever state it is in, and whoever made it.
func remove(ctx context.Context, s *state) error {
	spaces, err := labSpaces(s.Name)
	if err != nil {
		return err
	}
	errs := []error{endProcesses(spaces)}
	if link := filepath.Join("/sys/class/net", machineLink); s.MachineLink && exists(link) {
		errs = append(errs, ip(ctx, "", "link del "+machineLink))
	}
	cp := netnsPrefix(s.Name) + "cp"
	for _, ns := range spaces {
		if node := strings.TrimPrefix(ns, netnsPrefix(s.Name)); ns != cp && slices.Contains(spaces, cp) {
			_ = ip(ctx, cp, "link del "+node) // see Node.unlink
		}
		errs = append(errs, ip(ctx, "", "netns del "+ns))
	}
	errs = append(errs, removeCgroups(cgroupName(s.Name)))
	if mounted(s.dir) {
		if err := syscall.Unmount(s.dir, syscall.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", s.dir, err))
		}
	}
	if err := os.Remove(s.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	_ = os.Remove(filepath.Dir(s.dir)) // when it was the last lab
	return errors.Join(errs...)
}

// Leftovers names everything there is of a lab on this machine; nothing, after Close.
func Leftovers(stateDir, name string) ([]string, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	spaces, err := labSpaces(name)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, ns := range spaces {
		left = append(left, "network namespace "+ns)
	}
	groups, err := cgroups(cgroupName(name))
	if err != nil {
		return nil, err
	}
	for _, dir := range groups {
		left = append(left, "cgroup "+dir)
	}
	dir := filepath.Join(stateDir, name)
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 1 && (f[1] == dir || strings.HasPrefix(f[1], dir+"/")) {
			left = append(left, "mount "+f[1])
		}
	}
	if exists(dir) {
		left = append(left, "directory "+dir)
	}
	// A process is a lab's by its working directory, its command line or its namespaces; the latter two outlive names.
	err = eachProcess(func(pid int) {
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if bytes.Contains(cmdline, []byte(dir+"/")) {
			left = append(left, fmt.Sprintf("process %d: %s", pid, bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '})))
		}
	})
	return left, err
}

// labSpaces lists the names of a lab's network namespaces.
func labSpaces(name string) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(netnsDir, netnsPrefix(name)) + "*")
	for i := range paths {
		paths[i] = filepath.Base(paths[i])
	}
	return paths, err
}

// mounted reports whether dir is a mount point.
func mounted(dir string) bool {
	var here, above syscall.Stat_t
	return syscall.Stat(dir, &here) == nil && syscall.Stat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}

// eachProcess calls fn for every process that is not dead, and not this one.
func eachProcess(fn func(pid int)) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if _, err := netlab.ProcessStart(pid); err == nil {
			fn(pid)
		}
	}
	return nil
}

// endTimeout bounds the wait for killed processes.
const endTimeout = 20 * time.Second

// endProcesses kills whatever runs in the named network namespaces: the control plane, and the first process of each node,
// with which the rest of the node goes.
func endProcesses(spaces []string) error {
	var ids []string
	for _, ns := range spaces {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(netnsDir, ns), &st); err != nil {
			return err
		}
		ids = append(ids, fmt.Sprintf("net:[%d]", st.Ino))
	}
	for deadline := time.Now().Add(endTimeout); ; {
		var left []int
		err := eachProcess(func(pid int) {
			if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && slices.Contains(ids, ns) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
				left = append(left, pid)
			}
		})
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end", left)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
