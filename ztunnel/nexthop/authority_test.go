package nexthop_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// anyone takes every address and hostname it is asked for, so that only the authority's form decides.
func anyone(hosts ...string) (*mesh.Snapshot, *mesh.Workload) {
	w := &mesh.Workload{UID: "c//Pod/ns/w", Namespace: "ns", Name: "w", AppTunnel: mesh.AppTunnel{Proxy: true}}
	d := mesh.Delta{Workloads: []*mesh.Workload{w}}
	for i, h := range hosts {
		d.Services = append(d.Services, &mesh.Service{
			Namespace: "ns", Hostname: h, Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}},
			VIPs: []mesh.VIP{{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i)}), 32)}},
		})
	}
	return new(mesh.Snapshot).Apply(d), w
}

var local = netip.MustParseAddrPort("10.0.0.1:15008")

func TestInboundRefusesMalformedAuthorities(t *testing.T) {
	t.Parallel()
	s, w := anyone("a.b", "1.2.3", "a")
	for _, a := range []string{
		"", ":", ":80", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:080", "10.0.0.1:+80", "10.0.0.1:65536", "10.0.0.1:http",
		"10.0.0.1:80 ", " 10.0.0.1:80", "10.0.0.1:-1", "10.0.0.256:80", "10.0.0:80", "010.0.0.1:80", "1.2.3:80",
		"::1:80", "[::1]", "[::1]:", "[::1", "[]:80", "[::1]80", "[fe80::1%eth0]:80", "[10.0.0.1]:80", "[::ffff:10.0.0.1]:80", "[a.b]:80",
		"[[::1]]:80", "a..b:80", ".a.b:80", "a.b..:80", ".:80", "user@a.b:80", "http://a.b:80", "a.b:80/", "a b:80", "a.b\n:80", "a.b\x00:80",
		"\u212a.b:80", "a.b:8\u0660", "*.b:80", "a.b,c:80", strings.Repeat("a", 64) + ".b:80", strings.Repeat("a.", 130) + "b:80",
	} {
		_, err := nexthop.Inbound(s, w, local, a)
		if e, ok := err.(*nexthop.Error); !ok || e.Fault != nexthop.BadAuthority || e.Status() != 400 {
			t.Errorf("Inbound(%q) = %v, want a bad authority and status 400", a, err)
		}
	}
}

func TestInboundTakesWellFormedAuthorities(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	s, w := anyone("a.b", "a", "my_svc.ns", "xn--bcher-kva.example", "1a.2b", "3.4.5c", long)
	for _, a := range []string{
		"10.0.0.1:80", "255.255.255.255:65535", "[::1]:80", "[2001:DB8::1]:1", "a.b:80", "A.B:80", "a.b.:80", "a:80", "my_svc.ns:80",
		"xn--bcher-kva.example:80", "1a.2b:80", "3.4.5c:80", long + ":80",
	} {
		hop, err := nexthop.Inbound(s, w, local, a)
		if err != nil {
			t.Errorf("Inbound(%q): %v, want a hop", a, err)
			continue
		}
		if hop.Addr.Addr() != local.Addr() {
			t.Errorf("Inbound(%q) leads to %v, want %v", a, hop.Addr, local.Addr())
		}
	}
}

// FuzzInbound holds what must be true whatever a peer asks for: never a panic, never a hop away from the address the
// connection came to, never to one of the proxy's own ports, and never to an address that is not the workload's.
func FuzzInbound(f *testing.F) {
	for _, a := range []string{"10.0.0.1:80", "[fd00::1]:80", "cart.shop.svc:80", "10.0.0.1:15008", "10.0.0.2:80", "[::1%x]:1", "a:b:c", "\xff:1"} {
		f.Add(a)
	}
	w := &mesh.Workload{UID: "c//Pod/shop/cart-1", Namespace: "shop", Name: "cart-1", Addrs: []netip.Addr{
		netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1"),
	}}
	s := new(mesh.Snapshot).Apply(mesh.Delta{Workloads: []*mesh.Workload{w}, Services: []*mesh.Service{{
		Namespace: "shop", Hostname: "cart.shop.svc", Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 90, TargetPort: 15008}},
	}}})
	f.Fuzz(func(t *testing.T, a string) {
		hop, err := nexthop.Inbound(s, w, local, a)
		if err != nil {
			e, ok := err.(*nexthop.Error)
			if !ok || (e.Status() != 400 && e.Status() != 503) {
				t.Fatalf("Inbound(%q): %#v, want a *nexthop.Error of status 400 or 503", a, err)
			}
			return
		}
		if hop.Protocol != nexthop.TCP || hop.Addr.Addr() != local.Addr() {
			t.Fatalf("Inbound(%q) = %v %v, want TCP to %v", a, hop.Protocol, hop.Addr, local.Addr())
		}
		switch hop.Addr.Port() {
		case 0, mesh.PortOutbound, mesh.PortPassthrough, mesh.PortHBONE:
			t.Fatalf("Inbound(%q) leads to port %d", a, hop.Addr.Port())
		}
		if hop.Service == nil && !w.HasAddr(hop.Target.Addr()) {
			t.Fatalf("Inbound(%q) let the peer ask for %v", a, hop.Target)
		}
	})
}
