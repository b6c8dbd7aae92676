package cni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/linux"
)

// procDir is where the machine's processes are seen: /proc, or where a container mounts the host's.
type procDir string

// process is one that runs in a pod.
type process struct {
	pid     int
	started uint64 // in clock ticks since boot
}

// oldest finds the oldest process of each of the pods, by UID: the one that holds the sandbox. Processes that end while
// it looks are passed over.
func (d procDir) oldest(uids map[string]bool) (map[string]process, error) {
	dir, err := os.Open(string(d))
	if err != nil {
		return nil, fmt.Errorf("look for processes of pods: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("look for processes of pods: %w", err)
	}
	found := make(map[string]process)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		cgroups, err := os.ReadFile(filepath.Join(string(d), name, "cgroup"))
		if err != nil {
			continue
		}
		uid := podOf(string(cgroups), uids)
		if uid == "" {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(string(d), name, "stat"))
		if err != nil {
			continue
		}
		started, ok := startTime(string(stat))
		if !ok {
			continue
		}
		p := process{pid, started}
		if have, ok := found[uid]; !ok || p.started < have.started || p.started == have.started && p.pid < have.pid {
			found[uid] = p
		}
	}
	return found, nil
}

// podOf returns which of the pods the process with these lines of /proc/PID/cgroup belongs to, or "".
//
// The kubelet names a pod's group pod<UID>, or with the systemd driver kubepods-<class>-pod<UID with underscores>.slice.
// What is around it differs between drivers, versions of cgroups and runtimes, and begins with ".." when it is seen from
// another group.
func podOf(cgroups string, uids map[string]bool) string {
	for line := range strings.Lines(cgroups) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":") // hierarchy:controllers:path
		_, path, _ := strings.Cut(rest, ":")
		for _, part := range strings.FieldsFunc(path, func(r rune) bool { return r == '/' || r == ':' }) {
			if uid, ok := strings.CutPrefix(part, "pod"); ok && uids[uid] {
				return uid
			}
			slice, ok := strings.CutSuffix(part, ".slice")
			if i := strings.LastIndex(slice, "-pod"); ok && i >= 0 {
				if uid := strings.ReplaceAll(slice[i+len("-pod"):], "_", "-"); uids[uid] {
					return uid
				}
			}
		}
	}
	return ""
}

// startTime reads field 22 of /proc/PID/stat (proc(5)). The second field, a name in parentheses, may hold anything.
func startTime(stat string) (uint64, bool) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, false
	}
	f := strings.Fields(stat[i+1:]) // from field 3 on
	if len(f) < 20 {
		return 0, false
	}
	t, err := strconv.ParseUint(f[19], 10, 64)
	return t, err == nil
}

func (d procDir) netns(pid int) string {
	return filepath.Join(string(d), strconv.Itoa(pid), "ns", "net")
}

// onHost is a path of the host's /proc as this process sees it. Other paths are the same for both.
func (d procDir) onHost(path string) string {
	if rest, ok := strings.CutPrefix(path, "/proc/"); ok {
		return filepath.Join(string(d), rest)
	}
	return path
}

// hosts are the namespaces no pod has: the agent's own, which on Kubernetes is the machine's, and that of the first
// process if it may be looked at.
func (d procDir) hosts() ([]uint64, error) {
	own, err := netnsID("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	ids := []uint64{own}
	if first, err := netnsID(d.netns(1)); err == nil {
		ids = append(ids, first)
	}
	return ids, nil
}

var errHostNetwork = errors.New("network namespace is the host's")

// owns reports whether one of the addresses is on a device of the namespace.
func owns(path string, ips []netip.Addr) (bool, error) {
	ns, err := linux.OpenNetNS(path)
	if err != nil {
		return false, err
	}
	defer ns.Close()
	var have []net.Addr
	if err := ns.Do(func() (err error) { have, err = net.InterfaceAddrs(); return err }); err != nil {
		return false, fmt.Errorf("list addresses of the namespace: %w", err)
	}
	for _, a := range have {
		if p, err := netip.ParsePrefix(a.String()); err == nil && slices.Contains(ips, p.Addr().Unmap()) {
			return true, nil
		}
	}
	return false, nil
}
