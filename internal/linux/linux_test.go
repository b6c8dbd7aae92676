package linux_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/linux"
)

// needRoot skips without root, which must not happen in CI.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("needs root")
	}
	t.Skip("needs root: makes network namespaces")
}

// newNS returns an unnamed network namespace with its loopback up; it is gone when its last descriptor is.
func newNS(t testing.TB) *linux.NetNS {
	t.Helper()
	needRoot(t)
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- result{nil, err}
			return
		}
		defer home.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- result{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			err = unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			runtime.UnlockOSThread()
		}
		done <- result{f, err}
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	ns, err := linux.NetNSFromFile(r.f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	in(t, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return ns
}

func in(t testing.TB, ns *linux.NetNS, fn func() error) {
	t.Helper()
	if err := ns.Do(fn); err != nil {
		t.Fatal(err)
	}
}

// nft loads a ruleset in ns.
func nft(t testing.TB, ns *linux.NetNS, rules string) {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs nft, of the package nftables")
		}
		t.Skip("needs nft, of the package nftables")
	}
	in(t, ns, func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
}

func listen(t testing.TB, ns *linux.NetNS, o linux.ListenOptions) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	l, err := ns.Listen(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

// dialed connects and returns both ends.
func dialed(t testing.TB, ns *linux.NetNS, l *net.TCPListener, o linux.DialOptions) (client, server *net.TCPConn) {
	t.Helper()
	if o.Timeout == 0 {
		o.Timeout = 5 * time.Second
	}
	client, err := ns.Dial(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if err := l.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	server, err = l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// echoes checks that bytes pass both ways and that half-close works.
func echoes(t testing.TB, client, server *net.TCPConn) {
	t.Helper()
	want := []byte("through the namespace")
	if _, err := client.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("server read %q, %v; want %q", got, err, want)
	}
	if _, err := server.Write(got); err != nil {
		t.Fatal(err)
	}
	server.Close()
	if got, err = io.ReadAll(client); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("client read %q, %v; want %q", got, err, want)
	}
}

func sockopt(t testing.TB, c syscall.Conn, level, name int) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	value := -1
	var gerr error
	if err := raw.Control(func(fd uintptr) { value, gerr = unix.GetsockoptInt(int(fd), level, name) }); err != nil {
		t.Fatal(err)
	}
	if gerr != nil {
		t.Fatal(gerr)
	}
	return value
}

func TestWildcardListenerTakesBothFamilies(t *testing.T) {
	ns := newNS(t)
	l, at := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort("[::]:0"), Mark: 0x539, ReusePort: true})
	for _, host := range []string{"127.0.0.1", "::1"} {
		remote := netip.AddrPortFrom(netip.MustParseAddr(host), at.Port())
		client, server := dialed(t, ns, l, linux.DialOptions{Remote: remote, Mark: 0x111})
		if got := sockopt(t, client, unix.SOL_SOCKET, unix.SO_MARK); got != 0x111 {
			t.Errorf("mark of the dialled socket = %#x, want 0x111", got)
		}
		if got := sockopt(t, server, unix.SOL_SOCKET, unix.SO_MARK); got != 0x539 {
			t.Errorf("mark of the accepted socket = %#x, want 0x539", got)
		}
		if got, err := linux.OriginalDst(server); err != nil || got != remote {
			t.Errorf("OriginalDst without redirection = %v, %v; want %v", got, err, remote)
		}
		echoes(t, client, server)
	}
	// The port is the namespace's own: outside, nobody listens there on behalf of it.
	var outside *linux.NetNS
	l2, err := outside.Listen(t.Context(), linux.ListenOptions{Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port())})
	if errors.Is(err, unix.EADDRINUSE) {
		t.Skip("port taken by a stranger")
	}
	if err != nil {
		t.Fatal(err)
	}
	l2.Close()
}

func TestReusePort(t *testing.T) {
	ns := newNS(t)
	_, at := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort("[::]:0"), ReusePort: true})
	listen(t, ns, linux.ListenOptions{Addr: at, ReusePort: true})
	if _, err := ns.Listen(t.Context(), linux.ListenOptions{Addr: at}); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("third listener without ReusePort: %v, want EADDRINUSE", err)
	}
}

func TestListenWithoutIPv6(t *testing.T) {
	ns := newNS(t)
	in(t, ns, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	l, at := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort("[::]:0")})
	client, server := dialed(t, ns, l, linux.DialOptions{Remote: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port())})
	echoes(t, client, server)
}

func TestDialErrors(t *testing.T) {
	ns := newNS(t)
	in(t, ns, func() error {
		la := netlink.NewLinkAttrs()
		la.Name = "hole"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "peer"}); err != nil {
			return err
		}
		for _, name := range []string{"hole", "peer"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
		}
		l, err := netlink.LinkByName("hole")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("10.11.12.1/24")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, addr)
	})
	hole := netip.MustParseAddrPort("10.11.12.13:80")
	cause := errors.New("policy changed")
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	soon, cancel2 := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel2()
	tests := []struct {
		name string
		ctx  context.Context
		o    linux.DialOptions
		want error
	}{
		{"nobody listens", t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("127.0.0.1:9")}, unix.ECONNREFUSED},
		{"nobody listens, IPv6", t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("[::1]:9")}, unix.ECONNREFUSED},
		{"no route", t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("192.0.2.1:9")}, unix.ENETUNREACH},
		{"timeout", t.Context(), linux.DialOptions{Remote: hole, Timeout: 30 * time.Millisecond}, os.ErrDeadlineExceeded},
		{"context deadline", soon, linux.DialOptions{Remote: hole, Timeout: time.Minute}, context.DeadlineExceeded},
		{"context done before", gone, linux.DialOptions{Remote: hole}, context.Canceled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := ns.Dial(tt.ctx, tt.o)
			if c != nil {
				c.Close()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("Dial(%v) = %v, want %v", tt.o.Remote, err, tt.want)
			}
			var oe *net.OpError
			if !errors.As(err, &oe) {
				t.Errorf("Dial(%v) = %T, want *net.OpError", tt.o.Remote, err)
			}
		})
	}
	for _, o := range []linux.DialOptions{{}, {Remote: hole, Local: netip.MustParseAddr("::1")}} {
		if c, err := ns.Dial(t.Context(), o); err == nil {
			c.Close()
			t.Errorf("Dial(%+v) succeeded, want an error", o)
		}
	}
}

// TestSpoofedSource connects from an address the namespace does not have; replies find their way by mark, as they do in
// an enrolled pod.
func TestSpoofedSource(t *testing.T) {
	for _, tt := range []struct{ source, listen, all string }{
		{"10.9.9.9", "127.0.0.1:0", "0.0.0.0/0"},
		{"fd99::9", "[::1]:0", "::/0"},
	} {
		t.Run(tt.source, func(t *testing.T) {
			ns := newNS(t)
			source := netip.MustParseAddr(tt.source)
			in(t, ns, func() error {
				lo, err := netlink.LinkByName("lo")
				if err != nil {
					return err
				}
				_, all, err := net.ParseCIDR(tt.all)
				if err != nil {
					return err
				}
				rule := netlink.NewRule()
				rule.Mark, rule.Table, rule.Priority, rule.Family = 0x539, 100, 32764, netlink.FAMILY_V4
				if source.Is6() {
					rule.Family = netlink.FAMILY_V6
				}
				if err := netlink.RuleAdd(rule); err != nil {
					return err
				}
				return netlink.RouteAdd(&netlink.Route{
					LinkIndex: lo.Attrs().Index, Dst: all, Table: 100, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
				})
			})
			l, at := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort(tt.listen), Mark: 0x539})
			o := linux.DialOptions{Remote: at, Local: source, Mark: 0x539}
			client, server := dialed(t, ns, l, o)
			if got := server.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); got != source {
				t.Errorf("server sees %v, want %v", got, source)
			}
			echoes(t, client, server)
		})
	}
}

func TestOriginalDst(t *testing.T) {
	ns := newNS(t)
	nft(t, ns, `
table inet nat {
	chain output { type nat hook output priority -100; tcp dport 80 redirect to :15001; }
}`)
	in(t, ns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, a := range []string{"10.1.2.3/32", "fd10::3/128"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(lo, addr); err != nil {
				return err
			}
		}
		return nil
	})
	for _, addr := range []string{"[::]:15001", "0.0.0.0:15001"} {
		l, _ := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort(addr)})
		for _, to := range []string{"10.1.2.3:80", "[fd10::3]:80"} {
			want := netip.MustParseAddrPort(to)
			if addr[0] != '[' && want.Addr().Is6() {
				continue
			}
			client, server := dialed(t, ns, l, linux.DialOptions{Remote: want})
			if got, err := linux.OriginalDst(server); err != nil || got != want {
				t.Errorf("listening on %s: OriginalDst = %v, %v; want %v", addr, got, err, want)
			}
			echoes(t, client, server)
			server.Close()
			if _, err := linux.OriginalDst(server); !errors.Is(err, net.ErrClosed) {
				t.Errorf("OriginalDst of a closed connection: %v, want net.ErrClosed", err)
			}
		}
		l.Close()
	}
}

func TestDoComesHome(t *testing.T) {
	ns := newNS(t)
	var home *linux.NetNS
	homeID, err := home.ID()
	if err != nil {
		t.Fatal(err)
	}
	nsID, err := ns.ID()
	if err != nil {
		t.Fatal(err)
	}
	if homeID == nsID {
		t.Fatalf("both namespaces have the inode %d", nsID)
	}
	here := func() uint64 {
		var st unix.Stat_t
		if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
			t.Error(err)
		}
		return st.Ino
	}
	second := newNS(t)
	secondID, err := second.ID()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				err := ns.Do(func() error {
					if got := here(); got != nsID {
						t.Errorf("inside Do: namespace %d, want %d", got, nsID)
					}
					err := second.Do(func() error {
						if got := here(); got != secondID {
							t.Errorf("inside the nested Do: namespace %d, want %d", got, secondID)
						}
						return nil
					})
					if got := here(); got != nsID {
						t.Errorf("after the nested Do: namespace %d, want %d", got, nsID)
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if got := here(); got != homeID {
					t.Errorf("after Do: namespace %d, want %d", got, homeID)
				}
			}
		})
	}
	wg.Wait()
	want := errors.New("from inside")
	if err := ns.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do = %v, want %v", err, want)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do of a function that ends its goroutine = nil, want an error")
	}
	if got := here(); got != homeID {
		t.Errorf("after an aborted Do: namespace %d, want %d", got, homeID)
	}
}

func TestOpenNetNSRefusesOtherFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/proc/self/ns/mnt", "/dev/null", filepath.Join(t.TempDir(), "absent")} {
		if ns, err := linux.OpenNetNS(path); err == nil {
			ns.Close()
			t.Errorf("OpenNetNS(%s) succeeded, want an error", path)
		}
	}
	ns, err := linux.OpenNetNS("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if _, err := ns.ID(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("ID of a closed handle: %v, want os.ErrClosed", err)
	}
	if err := ns.Do(func() error { return nil }); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Do of a closed handle: %v, want os.ErrClosed", err)
	}
}

func TestHasCapNetAdmin(t *testing.T) {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	var eff uint64
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if _, err := fmt.Sscanf(v, "%x", &eff); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, want := linux.HasCapNetAdmin(), eff&(1<<unix.CAP_NET_ADMIN) != 0; got != want {
		t.Errorf("HasCapNetAdmin() = %v, want %v", got, want)
	}
}

// TestNoDescriptorLeaks runs the paths that fail and counts descriptors.
func TestNoDescriptorLeaks(t *testing.T) {
	ns := newNS(t)
	fds := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(e)
	}
	_, at := listen(t, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	fail := func() {
		_, err := ns.Dial(t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("127.0.0.1:9")})
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Error(err)
		}
		if _, err := ns.Dial(t.Context(), linux.DialOptions{Remote: netip.MustParseAddrPort("192.0.2.1:9")}); err == nil {
			t.Error("dial without a route succeeded")
		}
		if _, err := ns.Listen(t.Context(), linux.ListenOptions{Addr: at}); !errors.Is(err, unix.EADDRINUSE) {
			t.Error(err)
		}
		if _, err := linux.OpenNetNS("/dev/null"); err == nil {
			t.Error("/dev/null opened as a namespace")
		}
	}
	fail()
	before := fds()
	for range 50 {
		fail()
	}
	if after := fds(); after > before {
		t.Errorf("%d descriptors after 50 rounds of failures, %d before", after, before)
	}
}

func BenchmarkDial(b *testing.B) {
	ns := newNS(b)
	l, at := listen(b, ns, linux.ListenOptions{Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	dial := func(b *testing.B, d func() (net.Conn, error)) {
		b.ReportAllocs()
		for b.Loop() {
			c, err := d()
			if err != nil {
				b.Fatal(err)
			}
			if err := c.(*net.TCPConn).SetLinger(0); err != nil {
				b.Fatal(err)
			}
			c.Close()
		}
	}
	b.Run("namespace", func(b *testing.B) {
		dial(b, func() (net.Conn, error) {
			return ns.Dial(b.Context(), linux.DialOptions{Remote: at, Mark: 1, Timeout: time.Second})
		})
	})
	var home *linux.NetNS
	l2, at2 := listen(b, home, linux.ListenOptions{Addr: netip.MustParseAddrPort("127.0.0.1:0")})
	go func() {
		for {
			c, err := l2.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	b.Run("home", func(b *testing.B) {
		dial(b, func() (net.Conn, error) {
			return home.Dial(b.Context(), linux.DialOptions{Remote: at2, Timeout: time.Second})
		})
	})
	b.Run("net.Dial", func(b *testing.B) {
		dial(b, func() (net.Conn, error) { return net.DialTimeout("tcp", at2.String(), time.Second) })
	})
	b.Run("enter", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := ns.Do(func() error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}
