package mesh_test

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	diff "github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
)

// lookups is all one can ask a snapshot.
type lookups interface {
	Workload(uid string) *mesh.Workload
	WorkloadAt(a mesh.NetworkAddr) *mesh.Workload
	Pod(namespace, name string) *mesh.Workload
	WorkloadNamed(hostname string) *mesh.Workload
	Service(key string) *mesh.Service
	ServiceAt(a mesh.NetworkAddr, clientNamespace string) *mesh.Service
	ServiceNamed(hostname, clientNamespace string) *mesh.Service
	Endpoints(serviceKey string) []mesh.Endpoint
	Find(a mesh.NetworkAddr, clientNamespace string) mesh.Address
	Policy(key string) *mesh.Policy
	PoliciesFor(w *mesh.Workload) ([]*mesh.Policy, []string)
	Counts() (workloads, services, policies int)
}

// dumb is a snapshot that keeps three maps and searches them from end to end.
type dumb struct {
	workloads map[string]*mesh.Workload
	services  map[string]*mesh.Service
	policies  map[string]*mesh.Policy
}

func newDumb() *dumb {
	return &dumb{make(map[string]*mesh.Workload), make(map[string]*mesh.Service), make(map[string]*mesh.Policy)}
}

func (d *dumb) apply(delta mesh.Delta) {
	for _, k := range delta.RemoveWorkloads {
		delete(d.workloads, k)
	}
	for _, k := range delta.RemoveServices {
		delete(d.services, k)
	}
	for _, k := range delta.RemovePolicies {
		delete(d.policies, k)
	}
	for _, w := range delta.Workloads {
		d.workloads[w.UID] = w
	}
	for _, s := range delta.Services {
		d.services[s.Namespace+"/"+s.Hostname] = s
	}
	for _, p := range delta.Policies {
		d.policies[p.Namespace+"/"+p.Name] = p
	}
}

// best is the first of the values that pass, in the order of before and then of their keys.
func best[V any](m map[string]*V, pass func(*V) bool, before ...func(*V) int) *V {
	var found *V
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !pass(m[k]) {
			continue
		}
		c := -1
		for _, f := range before {
			if found != nil {
				c = cmp.Compare(f(found), f(m[k])) // the greater comes first
			}
			if c != 0 {
				break
			}
		}
		if found == nil || c < 0 {
			found = m[k]
		}
	}
	return found
}

func (d *dumb) bestWorkload(pass func(w *mesh.Workload) bool) *mesh.Workload {
	pod := func(w *mesh.Workload) int { return yes(strings.Contains(w.UID, "//Pod/")) }
	hbone := func(w *mesh.Workload) int { return yes(w.Protocol == mesh.ProtocolHBONE) }
	return best(d.workloads, pass, pod, hbone)
}

func yes(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (d *dumb) Workload(uid string) *mesh.Workload { return d.workloads[uid] }

func (d *dumb) WorkloadAt(a mesh.NetworkAddr) *mesh.Workload {
	return d.bestWorkload(func(w *mesh.Workload) bool {
		return !w.HostNetwork && w.Network == a.Network && slices.Contains(w.Addrs, a.Addr)
	})
}

func (d *dumb) Pod(namespace, name string) *mesh.Workload {
	return d.bestWorkload(func(w *mesh.Workload) bool { return w.Namespace == namespace && w.Name == name })
}

func (d *dumb) WorkloadNamed(hostname string) *mesh.Workload {
	return d.bestWorkload(func(w *mesh.Workload) bool { return hostname != "" && w.Hostname == hostname })
}

func (d *dumb) Service(key string) *mesh.Service { return d.services[key] }

func seen(s *mesh.Service, client string) bool { return !s.NamespaceOnly || s.Namespace == client }

func (d *dumb) ServiceAt(a mesh.NetworkAddr, client string) *mesh.Service {
	local := func(s *mesh.Service) int { return yes(s.Namespace == client) }
	canonical := func(s *mesh.Service) int { return yes(s.Canonical) }
	bits := func(s *mesh.Service, single bool) int {
		n := -1
		for _, v := range s.VIPs {
			if v.Network == a.Network && v.Prefix.Contains(a.Addr) && (v.Prefix.IsSingleIP() || !single) {
				n = max(n, v.Prefix.Bits())
			}
		}
		return n
	}
	if s := best(d.services, func(s *mesh.Service) bool { return seen(s, client) && bits(s, true) >= 0 }, local, canonical); s != nil {
		return s
	}
	return best(d.services, func(s *mesh.Service) bool { return seen(s, client) && bits(s, false) >= 0 },
		local, func(s *mesh.Service) int { return bits(s, false) }, canonical)
}

func (d *dumb) ServiceNamed(hostname, client string) *mesh.Service {
	return best(d.services, func(s *mesh.Service) bool { return seen(s, client) && s.Hostname == hostname },
		func(s *mesh.Service) int { return yes(s.Namespace == client) }, func(s *mesh.Service) int { return yes(s.Canonical) })
}

func (d *dumb) Endpoints(key string) (eps []mesh.Endpoint) {
	for _, uid := range slices.Sorted(maps.Keys(d.workloads)) {
		for _, sp := range d.workloads[uid].Services {
			if sp.Service == key {
				eps = append(eps, mesh.Endpoint{Workload: d.workloads[uid], Ports: sp.Ports})
			}
		}
	}
	return eps
}

func (d *dumb) Find(a mesh.NetworkAddr, client string) mesh.Address {
	if w := d.WorkloadAt(a); w != nil {
		return mesh.Address{Workload: w}
	}
	return mesh.Address{Service: d.ServiceAt(a, client)}
}

func (d *dumb) Policy(key string) *mesh.Policy { return d.policies[key] }

func (d *dumb) PoliciesFor(w *mesh.Workload) (ps []*mesh.Policy, missing []string) {
	for _, scope := range []mesh.PolicyScope{mesh.ScopeGlobal, mesh.ScopeNamespace} {
		for _, k := range slices.Sorted(maps.Keys(d.policies)) {
			p := d.policies[k]
			if p.Scope == scope && (scope == mesh.ScopeGlobal || p.Namespace == w.Namespace) {
				ps = append(ps, p)
			}
		}
	}
	for _, k := range w.Policies {
		switch p := d.policies[k]; {
		case p == nil:
			missing = append(missing, k)
		case p.Scope == mesh.ScopeWorkload:
			ps = append(ps, p)
		}
	}
	return ps, missing
}

func (d *dumb) Counts() (workloads, services, policies int) {
	return len(d.workloads), len(d.services), len(d.policies)
}

// The vocabulary is small so that names and addresses collide.
var (
	nets  = []string{"", "n2"}
	nss   = []string{"a", "b", "c"}
	hosts = []string{"x.svc", "y.svc", "z.example"}
	uids  = []string{"c1//Pod/a/p", "c2//Pod/a/p", "c1//Pod/b/p", "c1//Pod/b/q", "c1/se/a/e1", "c1/se/a/e2", "c1/se/b/e1"}
	names = []string{"p", "q"}
	ips   = []string{"10.0.0.1", "10.0.0.2", "10.0.1.1", "10.1.0.1", "fd00::1", "fd00::2"}
	vips  = []string{"10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/24", "10.0.0.0/16", "10.0.0.0/8", "fd00::1/128", "fd00::/64", "0.0.0.0/0"}
)

func of(rng *rand.Rand, vs []string) string { return vs[rng.IntN(len(vs))] }

// some is a random part of vs in random order.
func some(rng *rand.Rand, vs []string) []string {
	vs = slices.Clone(vs)
	rng.Shuffle(len(vs), func(i, j int) { vs[i], vs[j] = vs[j], vs[i] })
	return vs[:rng.IntN(min(len(vs), 4))]
}

func randomDelta(rng *rand.Rand) (d mesh.Delta) {
	serviceKeys, policyKeys := pairs(nss, hosts), pairs(nss, names)
	d.RemoveWorkloads = some(rng, uids)
	d.RemoveServices = some(rng, serviceKeys)
	d.RemovePolicies = some(rng, policyKeys)
	for range rng.IntN(3) {
		w := &mesh.Workload{
			UID: of(rng, uids), Namespace: of(rng, nss), Name: of(rng, names), Network: of(rng, nets), HostNetwork: rng.IntN(5) == 0,
			Protocol: mesh.TunnelProtocol(rng.IntN(2)), Policies: some(rng, policyKeys),
		}
		if rng.IntN(3) == 0 {
			w.Hostname = of(rng, hosts)
		}
		for _, a := range some(rng, ips) {
			w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
		}
		for _, k := range some(rng, serviceKeys) {
			w.Services = append(w.Services, mesh.ServicePorts{
				Service: k, Ports: []mesh.Port{{ServicePort: 80, TargetPort: uint16(rng.IntN(100))}},
			})
		}
		d.Workloads = append(d.Workloads, w)
	}
	for range rng.IntN(3) {
		s := &mesh.Service{Namespace: of(rng, nss), Hostname: of(rng, hosts), Canonical: rng.IntN(2) == 0, NamespaceOnly: rng.IntN(4) == 0}
		for _, v := range some(rng, vips) {
			s.VIPs = append(s.VIPs, mesh.VIP{Network: of(rng, nets), Prefix: netip.MustParsePrefix(v)})
		}
		d.Services = append(d.Services, s)
	}
	for range rng.IntN(3) {
		d.Policies = append(d.Policies, &mesh.Policy{
			Namespace: of(rng, nss), Name: of(rng, names), Scope: mesh.PolicyScope(rng.IntN(3)), DryRun: rng.IntN(2) == 0,
		})
	}
	return d
}

func pairs(as, bs []string) (ps []string) {
	for _, a := range as {
		for _, b := range bs {
			ps = append(ps, a+"/"+b)
		}
	}
	return ps
}

// answers is what v says to every question, as text: nouns by their address in memory, so that a stale one shows.
func answers(v lookups) string {
	var b strings.Builder
	ask := func(question string, answer any) { fmt.Fprintf(&b, "%s = %v\n", question, answer) }
	for _, uid := range uids {
		ask("Workload "+uid, fmt.Sprintf("%p", v.Workload(uid)))
	}
	for _, key := range pairs(nss, hosts) {
		ask("Service "+key, fmt.Sprintf("%p", v.Service(key)))
		for _, ep := range v.Endpoints(key) {
			ask("Endpoints "+key, fmt.Sprintf("%p %v", ep.Workload, ep.Ports))
		}
	}
	for _, h := range hosts {
		ask("WorkloadNamed "+h, fmt.Sprintf("%p", v.WorkloadNamed(h)))
	}
	for _, key := range pairs(nss, names) {
		ns, name, _ := strings.Cut(key, "/")
		ask("Pod "+key, fmt.Sprintf("%p", v.Pod(ns, name)))
		ask("Policy "+key, fmt.Sprintf("%p", v.Policy(key)))
	}
	for _, ns := range append(nss, "elsewhere") {
		for _, h := range hosts {
			ask("ServiceNamed "+h+" from "+ns, fmt.Sprintf("%p", v.ServiceNamed(h, ns)))
		}
		for _, key := range pairs(nets, append(ips, "192.0.2.1")) {
			n, ip, _ := strings.Cut(key, "/")
			a := mesh.NetworkAddr{Network: n, Addr: netip.MustParseAddr(ip)}
			ask("ServiceAt "+key+" from "+ns, fmt.Sprintf("%p", v.ServiceAt(a, ns)))
			f := v.Find(a, ns)
			ask("Find "+key+" from "+ns, fmt.Sprintf("%p %p", f.Workload, f.Service))
			ask("WorkloadAt "+key, fmt.Sprintf("%p", v.WorkloadAt(a)))
		}
		ps, missing := v.PoliciesFor(&mesh.Workload{Namespace: ns, Policies: pairs(nss, names)})
		ask("PoliciesFor "+ns, fmt.Sprint(addresses(ps), missing))
	}
	workloads, services, policies := v.Counts()
	ask("Counts", []int{workloads, services, policies})
	return b.String()
}

func addresses(ps []*mesh.Policy) (s []string) {
	for _, p := range ps {
		s = append(s, fmt.Sprintf("%p", p))
	}
	return s
}

func lineDiff(want, got string) string {
	return diff.Diff(strings.Split(want, "\n"), strings.Split(got, "\n"))
}

func TestApplyEqualsADumbRebuildOnRandomDeltas(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(9, 10))
	for range 15 {
		s, d := new(mesh.Snapshot), newDumb()
		type moment struct {
			s    *mesh.Snapshot
			said string
		}
		var past []moment
		for range 30 {
			delta := randomDelta(rng)
			s = s.Apply(delta)
			d.apply(delta)
			said := answers(s)
			if diff := lineDiff(answers(d), said); diff != "" {
				t.Fatalf("after %+v (-dumb +got):\n%s", delta, diff)
			}
			past = append(past, moment{s, said})
		}
		for i, m := range past {
			if diff := lineDiff(m.said, answers(m.s)); diff != "" {
				t.Fatalf("snapshot %d was changed by a later Apply (-before +after):\n%s", i, diff)
			}
		}
	}
}
