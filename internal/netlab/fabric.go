package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fabricIPs are the addresses of host number i on the fabric.
func (l *Lab) fabricIPs(i int) []netip.Addr {
	ips := []netip.Addr{netip.AddrFrom4([4]byte{10, 99, 0, byte(i)})}
	if l.cfg.IPv6 {
		a := netip.MustParseAddr("fd99::").As16()
		a[15] = byte(i)
		ips = append(ips, netip.AddrFrom16(a))
	}
	return ips
}

// buildFabric makes the namespace between the nodes and its bridge, which has address 1 and answers for the nodes'
// default route: without one a local process could not even try a service's address.
func (l *Lab) buildFabric() error {
	n, err := l.newNamespace("fabric")
	if err != nil {
		return err
	}
	l.Fabric = n
	if err := n.Sysctl(l.baseSysctls()...); err != nil {
		return err
	}
	return n.Do(func() error {
		if _, err := setUp("lo"); err != nil {
			return err
		}
		la := netlink.NewLinkAttrs()
		la.Name = bridgeName
		snooping := false
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la, MulticastSnooping: &snooping}); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		if err := addAddrs(bridgeName, l.fabricIPs(1)); err != nil {
			return err
		}
		_, err := setUp(bridgeName)
		return err
	})
}

// addHost makes a namespace with eth0 on the fabric and its default route there.
func (l *Lab) addHost(name string, number int) (*Host, error) {
	n, err := l.newNamespace(name)
	if err != nil {
		return nil, err
	}
	h := &Host{Namespace: n, Name: name, IPs: l.fabricIPs(number)}
	if err := n.Sysctl(l.baseSysctls()...); err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	if err := l.plug(h); err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	return h, nil
}

// plug lays the cable. It is made in the fabric with its other end in the host, so it never is in a third place.
func (l *Lab) plug(h *Host) error {
	err := l.Fabric.Do(func() error {
		bridge, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		fd, err := unix.Open(h.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", h.Path, err)
		}
		defer unix.Close(fd)
		la := netlink.NewLinkAttrs()
		la.Name, la.MasterIndex = "to-"+h.Name, bridge.Attrs().Index
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		_, err = setUp(la.Name)
		return err
	})
	if err != nil {
		return err
	}
	return h.Do(func() error {
		if _, err := setUp("lo"); err != nil {
			return err
		}
		eth, err := setUp("eth0")
		if err != nil {
			return err
		}
		if err := addAddrs("eth0", h.IPs); err != nil {
			return err
		}
		for _, gw := range l.fabricIPs(1) {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: gw.AsSlice()}); err != nil {
				return fmt.Errorf("add default route by %s: %w", gw, err)
			}
		}
		return nil
	})
}

// connectHosts gives every host a route to every other node's pods.
func (l *Lab) connectHosts() error {
	hosts := []*Host{l.ControlPlane}
	for _, n := range l.Nodes {
		hosts = append(hosts, n.Host)
	}
	for _, h := range hosts {
		err := h.Do(func() error {
			for _, n := range l.Nodes {
				if n.Host == h {
					continue
				}
				for i, cidr := range n.PodCIDRs {
					dst := &net.IPNet{IP: cidr.Addr().AsSlice(), Mask: net.CIDRMask(cidr.Bits(), cidr.Addr().BitLen())}
					if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: n.IPs[i].AsSlice()}); err != nil {
						return fmt.Errorf("add route to %s: %w", cidr, err)
					}
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("host %s: %w", h.Name, err)
		}
	}
	return nil
}

// addAddrs gives a link of the namespace the caller is in its addresses, in the fabric's networks.
func addAddrs(name string, ips []netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	for _, ip := range ips {
		bits := 24
		if ip.Is6() {
			bits = 64
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(bits, ip.BitLen())}}
		if ip.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", ip, name, err)
		}
	}
	return nil
}

// buildPodBridge makes the bridge that the CNI plugin then finds, and has TCP and UDP between pods of the node routed
// instead of bridged. Otherwise the answer of a service's endpoint would go straight to the pod that called the service
// on the same bridge, past the translation of its address. Clusters load br_netfilter for that, which changes a machine's
// other bridges too.
func (n *Node) buildPodBridge(number int) error {
	mac := net.HardwareAddr{0x02, 0x6d, 0x6e, 0x6c, 0x00, byte(number)} // fixed: a bridge else changes it with its ports
	return n.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name, la.HardwareAddr = podBridgeName, mac
		snooping := false
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: la, MulticastSnooping: &snooping}); err != nil {
			return fmt.Errorf("add bridge %s: %w", podBridgeName, err)
		}
		for _, name := range []string{"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"} {
			// Only there where br_netfilter is loaded; then it would run the nodes' rules twice.
			if err := setSysctl(name, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		var rules strings.Builder
		for _, cidr := range n.PodCIDRs {
			match := fmt.Sprintf("ip daddr %s ip protocol { tcp, udp }", cidr)
			if cidr.Addr().Is6() {
				match = fmt.Sprintf("ip6 daddr %s ip6 nexthdr { tcp, udp }", cidr)
			}
			fmt.Fprintf(&rules, "\t\t%s meta pkttype set host ether daddr set %s\n", match, mac)
		}
		return loadRules(fmt.Sprintf(`table bridge netlab {
	chain route-pods {
		type filter hook prerouting priority dstnat;
%s	}
}
`, rules.String()))
	})
}
