package mesh_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
)

func TestParseIdentity(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		uri  string
		want mesh.Identity // zero: refused
	}{
		{"spiffe://cluster.local/ns/shop/sa/cart", mesh.Identity{"cluster.local", "shop", "cart"}},
		{"spiffe://td/ns/a.b/sa/c-d_e", mesh.Identity{"td", "a.b", "c-d_e"}},
		{"spiffe://td/ns/sa/sa/ns", mesh.Identity{"td", "sa", "ns"}},
		{"", mesh.Identity{}},
		{"cluster.local/ns/shop/sa/cart", mesh.Identity{}},
		{"https://cluster.local/ns/shop/sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local", mesh.Identity{}},
		{"spiffe:///ns/shop/sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/", mesh.Identity{}},
		{"spiffe://cluster.local/ns//sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart/", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart/extra", mesh.Identity{}},
		{"spiffe://cluster.local/x/ns/shop/sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local/sa/shop/ns/cart", mesh.Identity{}},
		{"spiffe://cluster.local/ns/../sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local/ns/sh%6fp/sa/cart", mesh.Identity{}},
		{"spiffe://user@cluster.local/ns/shop/sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local:1/ns/shop/sa/cart", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart?q", mesh.Identity{}},
		{"spiffe://cluster.local/ns/shop/sa/cart#f", mesh.Identity{}},
		{"spiffe://Cluster.Local/ns/shop/sa/cart", mesh.Identity{}},
	} {
		got, err := mesh.ParseIdentity(c.uri)
		if got != c.want || (err == nil) != (c.want != mesh.Identity{}) {
			t.Errorf("ParseIdentity(%q) = %+v, %v, want %+v", c.uri, got, err, c.want)
		}
		if err == nil && got.String() != c.uri {
			t.Errorf("ParseIdentity(%q).String() = %q", c.uri, got.String())
		}
	}
}

// FuzzParseIdentity holds that what is accepted is spelled in one way only and has no part with a slash: package authz
// compares identities part by part because of it.
func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://cluster.local/ns/shop/sa/cart")
	f.Add("spiffe://a/ns/b/sa/c/ns/d/sa/e")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := mesh.ParseIdentity(uri)
		if err != nil {
			if !id.IsZero() {
				t.Fatalf("ParseIdentity(%q) = %+v with error %v", uri, id, err)
			}
			return
		}
		for _, part := range []string{id.TrustDomain, id.Namespace, id.ServiceAccount} {
			if part == "" || strings.Contains(part, "/") {
				t.Fatalf("ParseIdentity(%q) = %+v: part %q", uri, id, part)
			}
		}
		if again, err := mesh.ParseIdentity(id.String()); err != nil || again != id {
			t.Fatalf("ParseIdentity(%q) = %+v, %v, want %+v", id.String(), again, err, id)
		}
	})
}

func TestNobody(t *testing.T) {
	t.Parallel()
	var id mesh.Identity
	if !id.IsZero() || id.String() != "" || id.Principal() != "" {
		t.Errorf("the zero Identity is %q, %q", id.String(), id.Principal())
	}
}

func TestServiceRanking(t *testing.T) {
	t.Parallel()
	vip := netip.MustParseAddr("10.0.0.1")
	service := func(ns, host string, prefix string, edit ...func(*mesh.Service)) *mesh.Service {
		s := &mesh.Service{Namespace: ns, Hostname: host, VIPs: []mesh.VIP{{Prefix: netip.MustParsePrefix(prefix)}}}
		for _, e := range edit {
			e(s)
		}
		return s
	}
	canonical := func(s *mesh.Service) { s.Canonical = true }
	hidden := func(s *mesh.Service) { s.NamespaceOnly = true }
	const one, wide, wider = "10.0.0.1/32", "10.0.0.0/24", "10.0.0.0/16"
	for _, c := range []struct {
		name     string
		services []*mesh.Service
		client   string
		want     string // key
	}{
		{"nothing known", nil, "a", ""},
		{"the first by key", []*mesh.Service{service("c", "h", one), service("b", "h", one)}, "a", "b/h"},
		{"canonical before the first", []*mesh.Service{service("b", "h", one), service("c", "h", one, canonical)}, "a", "c/h"},
		{"own namespace before canonical", []*mesh.Service{service("b", "h", one, canonical), service("c", "h", one)}, "c", "c/h"},
		{"hidden from another namespace", []*mesh.Service{service("b", "h", one, canonical, hidden), service("c", "h", one)}, "a", "c/h"},
		{"not hidden from its own", []*mesh.Service{service("b", "h", one, hidden)}, "b", "b/h"},
		{"nothing but a hidden one", []*mesh.Service{service("b", "h", one, hidden)}, "a", ""},
		{"an address before a range", []*mesh.Service{service("a", "h", wide, canonical), service("b", "h", one)}, "a", "b/h"},
		{"a hidden address leaves the range", []*mesh.Service{service("c", "h", wide), service("b", "h", one, hidden)}, "a", "c/h"},
		{"the longer range", []*mesh.Service{service("b", "h", wider, canonical), service("c", "h", wide)}, "a", "c/h"},
		{"own namespace before the longer range", []*mesh.Service{service("a", "h", wider), service("c", "h", wide)}, "a", "a/h"},
		{"canonical of equal ranges", []*mesh.Service{service("b", "h", wide), service("c", "h", wide, canonical)}, "a", "c/h"},
		{"another address", []*mesh.Service{service("b", "h", "10.0.0.2/32"), service("b", "i", "10.0.1.0/24")}, "a", ""},
	} {
		s := new(mesh.Snapshot).Apply(mesh.Delta{Services: c.services})
		got := ""
		if svc := s.ServiceAt(mesh.NetworkAddr{Addr: vip}, c.client); svc != nil {
			got = svc.Key()
		}
		if got != c.want {
			t.Errorf("%s: ServiceAt = %q, want %q", c.name, got, c.want)
		}
		if svc := s.ServiceAt(mesh.NetworkAddr{Network: "other", Addr: vip}, c.client); svc != nil {
			t.Errorf("%s: ServiceAt on another network = %s, want none", c.name, svc.Key())
		}
	}
}

func TestWorkloadRanking(t *testing.T) {
	t.Parallel()
	workload := func(uid string, edit func(w *mesh.Workload)) *mesh.Workload {
		w := &mesh.Workload{UID: uid, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
		edit(w)
		return w
	}
	plain := func(*mesh.Workload) {}
	hbone := func(w *mesh.Workload) { w.Protocol = mesh.ProtocolHBONE }
	host := func(w *mesh.Workload) { w.HostNetwork = true }
	for _, c := range []struct {
		name      string
		workloads []*mesh.Workload
		want      string
	}{
		{"a pod before one that speaks HBONE", []*mesh.Workload{workload("a/se", hbone), workload("b//Pod/x/y", plain)}, "b//Pod/x/y"},
		{"HBONE among pods", []*mesh.Workload{workload("a//Pod/x/y", plain), workload("b//Pod/x/y", hbone)}, "b//Pod/x/y"},
		{"the first by UID", []*mesh.Workload{workload("b//Pod/x/y", hbone), workload("a//Pod/x/y", hbone)}, "a//Pod/x/y"},
		{"not one on its node's network", []*mesh.Workload{workload("a//Pod/x/y", host), workload("b/se", plain)}, "b/se"},
	} {
		s := new(mesh.Snapshot).Apply(mesh.Delta{Workloads: c.workloads})
		if got := s.WorkloadAt(mesh.NetworkAddr{Addr: netip.MustParseAddr("10.0.0.1")}); got == nil || got.UID != c.want {
			t.Errorf("%s: WorkloadAt = %+v, want %s", c.name, got, c.want)
		}
	}
}

// TestPodOfTwoClusters: where one of two pods of a name goes, the other is still found.
func TestPodOfTwoClusters(t *testing.T) {
	t.Parallel()
	s := new(mesh.Snapshot).Apply(mesh.Delta{Workloads: []*mesh.Workload{
		{UID: "c1//Pod/a/p", Namespace: "a", Name: "p"}, {UID: "c2//Pod/a/p", Namespace: "a", Name: "p"},
	}})
	s = s.Apply(mesh.Delta{RemoveWorkloads: []string{"c2//Pod/a/p"}})
	if got := s.Pod("a", "p"); got == nil || got.UID != "c1//Pod/a/p" {
		t.Errorf("Pod = %+v, want c1's", got)
	}
}

func TestTargetPort(t *testing.T) {
	t.Parallel()
	svc := &mesh.Service{Ports: []mesh.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 81}}}
	ep := mesh.Endpoint{Ports: []mesh.Port{{ServicePort: 81, TargetPort: 9090}, {ServicePort: 80}, {ServicePort: 82, TargetPort: 9292}}}
	for port, want := range map[uint16]uint16{80: 8080, 81: 9090, 82: 9292, 83: 0} {
		if got := ep.TargetPort(svc, port); got != want {
			t.Errorf("TargetPort(%d) = %d, want %d", port, got, want)
		}
	}
}

func TestIterators(t *testing.T) {
	t.Parallel()
	s := new(mesh.Snapshot).Apply(mesh.Delta{
		Workloads: []*mesh.Workload{{UID: "w1"}, {UID: "w2"}},
		Services:  []*mesh.Service{{Namespace: "a", Hostname: "h"}},
		Policies:  []*mesh.Policy{{Namespace: "a", Name: "p"}},
	})
	var got []string
	for k, w := range s.Workloads() {
		got = append(got, k+" "+w.UID)
	}
	for k, svc := range s.Services() {
		got = append(got, k+" "+svc.Key())
	}
	for k, p := range s.Policies() {
		got = append(got, k+" "+p.Key())
	}
	slices.Sort(got)
	if diff := cmp.Diff([]string{"a/h a/h", "a/p a/p", "w1 w1", "w2 w2"}, got); diff != "" {
		t.Errorf("iterators (-want +got):\n%s", diff)
	}
	for range s.Workloads() {
		break // must not panic
	}
}

func TestLookupsDoNotAllocate(t *testing.T) {
	s := new(mesh.Snapshot).Apply(mesh.Delta{
		Workloads: []*mesh.Workload{{UID: "w", Namespace: "a", Name: "w", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}},
		Services: []*mesh.Service{{Namespace: "a", Hostname: "h", VIPs: []mesh.VIP{
			{Prefix: netip.MustParsePrefix("10.96.0.1/32")}, {Prefix: netip.MustParsePrefix("10.97.0.0/16")},
		}}},
	})
	for _, a := range []string{"10.0.0.1", "10.96.0.1", "10.97.1.1", "192.0.2.1"} {
		key := mesh.NetworkAddr{Addr: netip.MustParseAddr(a)}
		if n := testing.AllocsPerRun(100, func() { s.Find(key, "a") }); n != 0 {
			t.Errorf("Find(%s) allocates %v times, want 0", a, n)
		}
	}
	if n := testing.AllocsPerRun(100, func() { s.Pod("a", "w"); s.ServiceNamed("h", "a"); s.Workload("w"); s.Endpoints("a/h") }); n != 0 {
		t.Errorf("lookups by name allocate %v times, want 0", n)
	}
}

// BenchmarkApply changes one workload among 100 000.
func BenchmarkApply(b *testing.B) {
	var d mesh.Delta
	for i := range 100_000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		d.Workloads = append(d.Workloads, &mesh.Workload{UID: a.String(), Namespace: "a", Name: a.String(), Addrs: []netip.Addr{a}})
	}
	s := new(mesh.Snapshot).Apply(d)
	i := 0
	for b.Loop() {
		w := *d.Workloads[i%len(d.Workloads)]
		s = s.Apply(mesh.Delta{Workloads: []*mesh.Workload{&w}})
		i++
	}
}

// TestReaches: of what a name resolves to, a workload is not to try what it has no way to.
func TestReaches(t *testing.T) {
	t.Parallel()
	four, six, mapped := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:192.0.2.2")
	for _, c := range []struct {
		own         string
		named, want []netip.Addr
	}{
		{"10.0.0.1", []netip.Addr{four, six, mapped}, []netip.Addr{four, mapped.Unmap()}},
		{"fd00::1", []netip.Addr{four, six, mapped}, []netip.Addr{six}},
		{"10.0.0.1 fd00::1", []netip.Addr{four, six}, []netip.Addr{four, six}},
		{"10.0.0.1", []netip.Addr{six}, []netip.Addr{six}},
		{"", []netip.Addr{four, six}, []netip.Addr{four, six}},
	} {
		w := &mesh.Workload{}
		for own := range strings.FieldsSeq(c.own) {
			w.Addrs = append(w.Addrs, netip.MustParseAddr(own))
		}
		if got := w.Reaches(c.named); !slices.Equal(got, c.want) {
			t.Errorf("a workload at %q reaches %v of %v, want %v", c.own, got, c.named, c.want)
		}
	}
}
