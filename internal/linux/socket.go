package linux

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// defaultBacklog is the accept queue asked for when ListenOptions says nothing. The kernel caps it at the namespace's
// net.core.somaxconn.
const defaultBacklog = 4096

// ListenOptions says how a listener is made. The zero value listens on a free port of 0.0.0.0.
type ListenOptions struct {
	// Addr is where to listen. The wildcard [::] also takes IPv4, and becomes 0.0.0.0 where the machine has no IPv6.
	Addr netip.AddrPort
	// Mark is set as SO_MARK on the listener and so on what it accepts; 0: none.
	Mark uint32
	// ReusePort lets several sockets listen on Addr at once (SO_REUSEPORT), so that a successor starts before its
	// predecessor ends.
	ReusePort bool
	// Transparent accepts connections to addresses that are not the namespace's own (IP_TRANSPARENT).
	Transparent bool
	// Backlog is the length of the accept queue; 0: 4096.
	Backlog int
}

// Listen opens a TCP listener in the namespace. Errors hold their errno: EADDRINUSE, EPERM without CAP_NET_ADMIN.
func (n *NetNS) Listen(ctx context.Context, o ListenOptions) (*net.TCPListener, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	addr := o.Addr
	if !addr.Addr().IsValid() {
		addr = netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port())
	}
	l, err := n.listen(addr, o)
	if addr.Addr() == netip.IPv6Unspecified() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		addr = netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port())
		l, err = n.listen(addr, o)
	}
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: net.TCPAddrFromAddrPort(addr), Err: err}
	}
	return l, nil
}

func (n *NetNS) listen(addr netip.AddrPort, o ListenOptions) (*net.TCPListener, error) {
	fd, err := n.socket(family(addr.Addr()))
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	opts := []option{{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1, "SO_REUSEADDR"}}
	if o.ReusePort {
		opts = append(opts, option{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1, "SO_REUSEPORT"})
	}
	if addr.Addr() == netip.IPv6Unspecified() {
		opts = append(opts, option{unix.SOL_IPV6, unix.IPV6_V6ONLY, 0, "IPV6_V6ONLY"})
	}
	if o.Mark != 0 {
		opts = append(opts, option{unix.SOL_SOCKET, unix.SO_MARK, int(o.Mark), "SO_MARK"})
	}
	if o.Transparent {
		opts = append(opts, transparent(addr.Addr()))
	}
	if err := set(fd, opts...); err != nil {
		return nil, err
	}
	sa, err := sockaddr(addr)
	if err != nil {
		return nil, err
	}
	if err := unix.Bind(fd, sa); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	backlog := o.Backlog
	if backlog <= 0 {
		backlog = defaultBacklog
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// DialOptions says how a connection is made.
type DialOptions struct {
	// Remote is where to connect to.
	Remote netip.AddrPort
	// Local is the source address, which need not be the namespace's own (IP_TRANSPARENT, IP_FREEBIND; needs
	// CAP_NET_ADMIN or CAP_NET_RAW). Zero: the kernel chooses. It must be of Remote's family.
	Local netip.Addr
	// Mark is set as SO_MARK; 0: none.
	Mark uint32
	// Timeout bounds the connect; 0: only ctx does.
	Timeout time.Duration
}

// Dial opens a TCP connection from inside the namespace. Errors are *net.OpError and hold their errno (ECONNREFUSED,
// EHOSTUNREACH ...), os.ErrDeadlineExceeded when Timeout ran out, or ctx's error.
func (n *NetNS) Dial(ctx context.Context, o DialOptions) (*net.TCPConn, error) {
	c, err := n.dial(ctx, o)
	if err != nil {
		oe := &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(o.Remote), Err: err}
		if o.Local.IsValid() {
			oe.Source = &net.TCPAddr{IP: o.Local.AsSlice(), Zone: o.Local.Zone()}
		}
		return nil, oe
	}
	return c, nil
}

func (n *NetNS) dial(ctx context.Context, o DialOptions) (*net.TCPConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	remote := netip.AddrPortFrom(o.Remote.Addr().Unmap(), o.Remote.Port())
	local := o.Local.Unmap()
	if !remote.Addr().IsValid() {
		return nil, errors.New("no remote address")
	}
	if local.IsValid() && local.Is4() != remote.Addr().Is4() {
		return nil, fmt.Errorf("source %s and destination %s are of different families", local, remote.Addr())
	}
	var deadline time.Time
	if o.Timeout > 0 {
		deadline = time.Now().Add(o.Timeout)
	}
	fd, err := n.socket(family(remote.Addr()))
	if err != nil {
		return nil, err
	}
	if err := prepare(fd, local, o.Mark); err != nil {
		unix.Close(fd)
		return nil, err
	}
	sa, err := sockaddr(remote)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	err = unix.Connect(fd, sa)
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	switch err {
	case nil, unix.EISCONN:
	case unix.EINPROGRESS, unix.EALREADY, unix.EINTR:
		if err := connected(ctx, f, fd, deadline); err != nil {
			return nil, err
		}
	default:
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// prepare sets what must be in place before connect.
func prepare(fd int, local netip.Addr, mark uint32) error {
	if mark != 0 {
		if err := set(fd, option{unix.SOL_SOCKET, unix.SO_MARK, int(mark), "SO_MARK"}); err != nil {
			return err
		}
	}
	if !local.IsValid() {
		return nil
	}
	// Without IP_BIND_ADDRESS_NO_PORT bind would pick the port before the destination is known, and the namespace's
	// ephemeral ports would be shared by all destinations.
	err := set(fd, transparent(local), freebind(local),
		option{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1, "IP_BIND_ADDRESS_NO_PORT"})
	if err != nil {
		return err
	}
	sa, err := sockaddr(netip.AddrPortFrom(local, 0))
	if err != nil {
		return err
	}
	return os.NewSyscallError("bind", unix.Bind(fd, sa))
}

// connected waits until a connect in progress has ended, and returns how.
func connected(ctx context.Context, f *os.File, fd int, deadline time.Time) error {
	// On one machine the handshake is often over by now: save the round through the poller.
	if _, err := unix.Getpeername(fd); err == nil {
		return nil
	}
	if !deadline.IsZero() {
		if err := f.SetWriteDeadline(deadline); err != nil {
			return err
		}
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
		defer stop()
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	err = raw.Write(func(uintptr) bool {
		code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			cerr = os.NewSyscallError("getsockopt", err)
			return true
		}
		if code != 0 {
			cerr = os.NewSyscallError("connect", unix.Errno(code))
			return true
		}
		// The first call comes before anything was waited for, and the poller may wake for nothing.
		_, err = unix.Getpeername(fd)
		return err == nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	default:
		return cerr
	}
}

// option is one integer socket option.
type option struct {
	level, name, value int
	text               string
}

func set(fd int, opts ...option) error {
	for _, o := range opts {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set %s: %w", o.text, os.NewSyscallError("setsockopt", err))
		}
	}
	return nil
}

func transparent(a netip.Addr) option {
	if a.Is4() {
		return option{unix.SOL_IP, unix.IP_TRANSPARENT, 1, "IP_TRANSPARENT"}
	}
	return option{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1, "IPV6_TRANSPARENT"}
}

func freebind(a netip.Addr) option {
	if a.Is4() {
		return option{unix.SOL_IP, unix.IP_FREEBIND, 1, "IP_FREEBIND"}
	}
	return option{unix.SOL_IPV6, unix.IPV6_FREEBIND, 1, "IPV6_FREEBIND"}
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) (unix.Sockaddr, error) {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}, nil
	}
	sa := &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	if zone := a.Addr().Zone(); zone != "" {
		ifi, err := net.InterfaceByName(zone)
		if err != nil {
			return nil, fmt.Errorf("resolve zone of %s: %w", a, err)
		}
		sa.ZoneId = uint32(ifi.Index)
	}
	return sa, nil
}
