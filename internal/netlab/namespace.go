package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/linux"
)

// netnsDir is where iproute2 and the CNI tools look for named namespaces.
const netnsDir = "/run/netns"

// Namespace is a named network namespace of a lab. Its handle's methods open sockets in it and run functions in it.
type Namespace struct {
	*linux.NetNS
	NSName string // the name "ip netns" shows
	Path   string // what to open, and what CNI plugins are given
	id     uint64
}

// newNamespace makes a namespace with its loopback down, and names it.
func (l *Lab) newNamespace(suffix string) (*Namespace, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("lab is closed")
	}
	name := l.ID + "-" + suffix
	path := filepath.Join(netnsDir, name)
	if err := prepareNetnsDir(); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("name namespace: %w", err)
	}
	f.Close()
	done := make(chan error, 1)
	go func() { done <- unshareTo(path) }()
	if err := <-done; err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	h, err := linux.OpenNetNS(path)
	if err != nil {
		return nil, errors.Join(err, deleteNamespace(path))
	}
	id, err := h.ID()
	if err != nil {
		h.Close()
		return nil, errors.Join(err, deleteNamespace(path))
	}
	n := &Namespace{NetNS: h, NSName: name, Path: path, id: id}
	l.spaces = append(l.spaces, n)
	return n, nil
}

// unshareTo makes a namespace and mounts it on path, then brings the thread home. It must not simply let the thread die: the
// process's first thread cannot, and would show a namespace that is not the process's in /proc/PID.
func unshareTo(path string) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer unix.Close(home)
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return os.NewSyscallError("unshare", err)
	}
	merr := os.NewSyscallError("mount", unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""))
	if err := unix.Setns(home, unix.CLONE_NEWNET); err != nil {
		return errors.Join(merr, os.NewSyscallError("setns", err)) // and leave the thread locked
	}
	runtime.UnlockOSThread()
	return merr
}

// prepareNetnsDir does what the first "ip netns add" on a machine does: namespaces are to be seen in every mount
// namespace, and names that are removed in one are to vanish from the others.
func prepareNetnsDir() error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	err := unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err := unix.Mount(netnsDir, netnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", netnsDir, err)
		}
		err = unix.Mount("", netnsDir, "none", unix.MS_SHARED|unix.MS_REC, "")
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", netnsDir, err)
	}
	return nil
}

// deleteNamespace removes the name; the namespace goes with its last user.
func deleteNamespace(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // nothing is mounted there any more
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Sysctl sets name=value pairs inside the namespace, names as sysctl(8) spells them, and fails unless each reads back as it
// was set.
func (n *Namespace) Sysctl(pairs ...string) error {
	return n.Do(func() error {
		for _, pair := range pairs {
			name, want, _ := strings.Cut(pair, "=")
			if err := setSysctl(name, want); err != nil {
				return err
			}
		}
		return nil
	})
}

func sysctlPath(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}

func setSysctl(name, want string) error {
	if err := os.WriteFile(sysctlPath(name), []byte(want), 0); err != nil {
		return fmt.Errorf("set %s=%s: %w", name, want, err)
	}
	got, err := readSysctl(name)
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("set %s=%s: it is %s", name, want, got)
	}
	return nil
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(sysctlPath(name))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// baseSysctls are for every namespace. Duplicate address detection would hold every IPv6 address back for a second.
func (l *Lab) baseSysctls() []string {
	s := []string{
		"net.ipv4.tcp_congestion_control=" + l.cfg.Congestion,
		"net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil && !l.cfg.IPv6 {
		return s // a kernel without IPv6 will do
	}
	return append(s,
		"net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0",
		"net.ipv6.conf.all.dad_transmits=0", "net.ipv6.conf.default.dad_transmits=0",
		"net.ipv6.conf.all.accept_ra=0", "net.ipv6.conf.default.accept_ra=0",
		"net.ipv6.conf.all.accept_redirects=0", "net.ipv6.conf.default.accept_redirects=0",
	)
}

// nodeSysctls make a router. A packet that comes in by the pods' bridge may go out by it again, which is no reason to tell
// its sender of a better way.
func nodeSysctls(ipv6 bool) []string {
	s := []string{"net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0", "net.ipv4.conf.default.send_redirects=0"}
	if ipv6 {
		s = append(s, "net.ipv6.conf.all.forwarding=1")
	}
	return s
}

// setUp brings a link of the namespace the caller is in up.
func setUp(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("set link %s up: %w", name, err)
	}
	return link, nil
}
