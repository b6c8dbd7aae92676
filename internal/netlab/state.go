package netlab

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultStateDir is where labs keep their files unless Config says otherwise.
const DefaultStateDir = "/run/mistnet-netlab"

const (
	stateFile = "lab.json"
	// halfMade is the prefix of a lab's directory until its state file is in it.
	halfMade = ".new-"
	// envLab marks every process a lab starts, so that it is found wherever it went.
	envLab = "MISTNET_LAB"
)

// state is what a lab writes down for those who clean up after it.
type state struct {
	ID    string `json:"id"`
	Name  string `json:"name,omitempty"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // the process's start time in clock ticks since boot, for PIDs are used again
	Keep  bool   `json:"keep,omitempty"`
	// Congestion is an algorithm that was allowed for this lab's sake; "": none.
	Congestion string `json:"congestion,omitempty"`

	root string
}

func (s *state) dir() string { return filepath.Join(s.root, s.ID) }

// newState draws an id and makes the lab's directory, which is never seen without its state file.
func newState(root, name string) (*state, error) {
	start, err := ProcessStart(os.Getpid())
	if err != nil {
		return nil, err
	}
	var b [3]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	s := &state{ID: "mnl-" + hex.EncodeToString(b[:]), Name: name, PID: os.Getpid(), Start: start, root: root}
	raw, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	tmp := filepath.Join(root, halfMade+s.ID)
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(tmp, stateFile), raw, 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, s.dir()); err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	return s, nil
}

// update changes the state file.
func (s *state) update(change func(*state)) error {
	change(s)
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := filepath.Join(s.dir(), "."+stateFile)
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(s.dir(), stateFile))
}

// alive reports whether the process that made the lab still runs.
func (s *state) alive() bool {
	start, err := ProcessStart(s.PID)
	return err == nil && start == s.Start
}

// ProcessStart says when a process started, in clock ticks since boot: with its number it names a process for good. A
// process that ended does not exist, waited for or not. It reads field 22 of /proc/PID/stat; the fields before it may hold anything but are closed by the last bracket.
func ProcessStart(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("read /proc/%d/stat: %d fields after the name", pid, len(fields))
	}
	if fields[0][0] == 'Z' || fields[0][0] == 'X' {
		return 0, fs.ErrNotExist // dead, only not waited for yet
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// states reads all labs below root.
func states(root string) ([]*state, error) {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []*state
	for _, e := range entries {
		if !e.IsDir() || strings.HasPrefix(e.Name(), halfMade) {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(root, e.Name(), stateFile))
		if errors.Is(err, fs.ErrNotExist) {
			continue // being removed by its owner
		}
		if err != nil {
			return nil, err
		}
		s := &state{root: root}
		if err := json.Unmarshal(raw, s); err != nil || s.ID != e.Name() {
			return nil, fmt.Errorf("read state of lab %s: damaged: remove %s by hand", e.Name(), filepath.Join(root, e.Name()))
		}
		all = append(all, s)
	}
	return all, nil
}

// Sweep removes every lab whose process is dead, except those that Keep was called for. stateDir "" is DefaultStateDir.
// Start calls it.
func Sweep(stateDir string) error {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	all, err := states(stateDir)
	if err != nil {
		return fmt.Errorf("sweep labs: %w", err)
	}
	var errs []error
	for _, s := range all {
		if s.Keep || s.alive() {
			continue
		}
		errs = append(errs, remove(stateDir, s.ID))
	}
	old, err := filepath.Glob(filepath.Join(stateDir, halfMade+"*"))
	errs = append(errs, err)
	for _, dir := range old {
		if info, err := os.Stat(dir); err == nil && time.Since(info.ModTime()) > time.Minute {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep labs: %w", err)
	}
	return nil
}

// Labs returns the ids of the labs there are, kept ones included.
func Labs(stateDir string) ([]string, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	all, err := states(stateDir)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, s := range all {
		ids = append(ids, s.ID)
	}
	return ids, nil
}

// Remove takes a lab down whoever made it, for example one that was kept.
func Remove(stateDir, id string) error {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	if len(id) < 5 || !strings.HasPrefix(id, "mnl-") || strings.ContainsAny(id, "/*?[") {
		return fmt.Errorf("remove lab: %q is no lab's id", id)
	}
	return remove(stateDir, id)
}

// remove ends the lab's processes, then removes its namespaces, then its files, so that what fails can be tried again.
func remove(root, id string) error {
	paths, inodes, err := namespacesOf(id)
	if err != nil {
		return err
	}
	if err := killLab(id, inodes); err != nil {
		return err
	}
	var errs []error
	for _, p := range paths {
		errs = append(errs, deleteNamespace(p))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	unlock, err := lock(root)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.RemoveAll(filepath.Join(root, id)); err != nil {
		return err
	}
	return restoreCongestion(root)
}

// namespacesOf lists a lab's named namespaces and their inodes.
func namespacesOf(id string) (paths []string, inodes map[uint64]bool, err error) {
	paths, err = filepath.Glob(filepath.Join(netnsDir, id+"-*"))
	if err != nil {
		return nil, nil, err
	}
	inodes = map[uint64]bool{}
	for _, p := range paths {
		var fsInfo unix.Statfs_t
		var st unix.Stat_t
		// A file that is not mounted over is what a process killed in between left: its inode is no namespace's.
		if unix.Statfs(p, &fsInfo) == nil && int64(fsInfo.Type) == unix.NSFS_MAGIC && unix.Stat(p, &st) == nil {
			inodes[st.Ino] = true
		}
	}
	return paths, inodes, nil
}

// Leftovers lists what there is of a lab: processes, namespaces, mounts and files. After Close it is empty.
func Leftovers(stateDir, id string) ([]string, error) {
	if stateDir == "" {
		stateDir = DefaultStateDir
	}
	var left []string
	paths, inodes, err := namespacesOf(id)
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		left = append(left, "namespace "+p)
	}
	pids, err := processes(id, inodes)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		left = append(left, fmt.Sprintf("process %d %s", pid, bytes.TrimSpace(comm)))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && strings.Contains(f[4], id) {
			left = append(left, "mount "+f[4])
		}
	}
	for _, dir := range []string{filepath.Join(stateDir, id), filepath.Join(stateDir, halfMade+id)} {
		if _, err := os.Lstat(dir); err == nil {
			left = append(left, "file "+dir)
		}
	}
	slices.Sort(left)
	return left, nil
}

// lock serialises what labs of several processes share: the allowed congestion control algorithms.
func lock(root string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(root, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, os.NewSyscallError("flock", err)
	}
	return func() { f.Close() }, nil
}
