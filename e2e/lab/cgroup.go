package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

func cgroupName(lab string) string { return "mistnet-e2e-" + lab }

// hierarchies lists where cgroups are made: one directory per controller with cgroup v1, the root itself with v2. Names of
// v1 controllers that share a mount ("cpu,cpuacct") have links to it, which are not listed.
func hierarchies() ([]string, error) {
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 2 && filepath.Dir(f[1]) == cgroupRoot && f[2] == "cgroup" {
			dirs = append(dirs, f[1])
		}
		if len(f) > 2 && f[1] == cgroupRoot && f[2] == "cgroup2" {
			return []string{cgroupRoot}, nil
		}
	}
	if len(dirs) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below " + cgroupRoot)
	}
	slices.Sort(dirs)
	return slices.Compact(dirs), nil
}

// makeCgroups makes a node's cgroup in every hierarchy and returns the directories.
func makeCgroups(lab, node string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var made []string
	for _, root := range roots {
		above := root
		for _, name := range []string{cgroupName(lab), node} {
			dir := filepath.Join(above, name)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, err
			}
			if err := inheritCgroup(above, dir); err != nil {
				return nil, fmt.Errorf("make cgroup %s: %w", dir, err)
			}
			above = dir
		}
		made = append(made, above)
	}
	return made, nil
}

// inheritCgroup gives a new cgroup what it does not get by itself: v1's cpuset starts empty, and admits nobody while it
// is; v2's controllers must be handed down.
func inheritCgroup(above, dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		from := filepath.Join(above, file)
		if !strings.HasPrefix(above, filepath.Join(cgroupRoot, "cpuset")) {
			break
		}
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
			return err
		}
	}
	controllers, err := os.ReadFile(filepath.Join(above, "cgroup.controllers"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // v1
	}
	if err != nil {
		return err
	}
	var enable strings.Builder
	for c := range strings.FieldsSeq(string(controllers)) {
		enable.WriteString("+" + c + " ")
	}
	return os.WriteFile(filepath.Join(above, "cgroup.subtree_control"), []byte(enable.String()), 0o644)
}

// cgroups lists those below every hierarchy's NAME, children first.
func cgroups(name string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		top := filepath.Join(root, name)
		err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Reverse(dirs)
	return dirs, nil
}

// removeCgroups removes what cgroups lists. The kernel refuses for a moment after the last process ended.
func removeCgroups(name string) error {
	for deadline := time.Now().Add(endTimeout); ; {
		dirs, err := cgroups(name)
		if err != nil || len(dirs) == 0 {
			return err
		}
		var errs []error
		for _, dir := range dirs {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		if time.Now().After(deadline) {
			return errors.Join(errs...)
		}
		if len(errs) > 0 {
			time.Sleep(20 * time.Millisecond)
		}
	}
}
