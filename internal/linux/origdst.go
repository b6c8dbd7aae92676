package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// originalDst is the number of SO_ORIGINAL_DST (linux/netfilter_ipv4.h) and of IP6T_SO_ORIGINAL_DST
// (linux/netfilter_ipv6/ip6_tables.h); it is the same in both.
const originalDst = 80

// OriginalDst returns where an accepted connection was addressed to before the kernel redirected it here. A connection
// that was not redirected keeps its local address. The address is never an IPv4 one mapped into IPv6.
func OriginalDst(c *net.TCPConn) (netip.AddrPort, error) {
	la, ok := c.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", net.ErrClosed)
	}
	local := la.AddrPort()
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	dst := local
	var gerr error
	err = raw.Control(func(fd uintptr) {
		if local.Addr().Is4() {
			dst, gerr = originalDst4(int(fd))
			return
		}
		dst, gerr = originalDst6(int(fd))
	})
	switch {
	case err != nil:
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	case gerr == nil:
		return dst, nil
	case errors.Is(gerr, unix.ENOENT), errors.Is(gerr, unix.ENOPROTOOPT), errors.Is(gerr, unix.EOPNOTSUPP):
		return local, nil // no connection tracking of it, or none at all: nothing was redirected
	}
	return netip.AddrPort{}, fmt.Errorf("original destination: %w", os.NewSyscallError("getsockopt", gerr))
}

// originalDst4 borrows a getter whose result is 20 bytes without interpretation: the answer is a struct sockaddr_in, with
// family, port and address in the first 8 bytes.
func originalDst4(fd int) (netip.AddrPort, error) {
	b, err := unix.GetsockoptIPv6Mreq(fd, unix.SOL_IP, originalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	raw := b.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(raw[4:8])), binary.BigEndian.Uint16(raw[2:4])), nil
}

// originalDst6 borrows a getter whose result begins with the struct sockaddr_in6 that the answer is.
func originalDst6(fd int) (netip.AddrPort, error) {
	b, err := unix.GetsockoptIPv6MTUInfo(fd, unix.SOL_IPV6, originalDst)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port := binary.NativeEndian.AppendUint16(nil, b.Addr.Port) // in network order as it lies in memory
	return netip.AddrPortFrom(netip.AddrFrom16(b.Addr.Addr).Unmap(), binary.BigEndian.Uint16(port)), nil
}

// HasCapNetAdmin reports whether the process may set marks and spoof addresses: whether its effective capabilities hold
// CAP_NET_ADMIN.
func HasCapNetAdmin() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[unix.CAP_NET_ADMIN/32].Effective&(1<<(unix.CAP_NET_ADMIN%32)) != 0
}
