package mesh

import (
	"iter"
	"net/netip"
	"slices"
	"strings"
)

// Snapshot is everything a proxy knows of the mesh at one moment, indexed. It is immutable: Apply returns the next one
// and shares what it does not touch. Load it once per decision and every answer agrees with every other.
//
// The zero value knows nothing.
type Snapshot struct {
	workloads table[string, *Workload]           // by UID
	byAddr    table[NetworkAddr, []*Workload]    // best first; host-network workloads are not here
	byPod     table[namespacedName, []*Workload] // by namespace and name; best first, as clusters may share names
	byName    table[string, []*Workload]         // by hostname
	services  table[string, *Service]            // by namespace/hostname
	byVIP     table[NetworkAddr, []*Service]     // single addresses
	ranges    []*Service                         // those with a VIP that is a range of addresses
	byHost    table[string, []*Service]          // by hostname
	endpoints table[string, []Endpoint]          // by service key, also of services not yet known
	policies  table[string, *Policy]             // by namespace/name
	inScope   table[string, []*Policy]           // "" for mesh-wide ones, else by namespace; sorted by key
}

type namespacedName struct{ namespace, name string }

// Delta is what changes from one Snapshot to the next. Removals happen before additions.
type Delta struct {
	RemoveWorkloads []string // UIDs
	RemoveServices  []string // namespace/hostname
	RemovePolicies  []string // namespace/name
	Workloads       []*Workload
	Services        []*Service
	Policies        []*Policy
}

// IsEmpty reports whether d changes nothing.
func (d *Delta) IsEmpty() bool {
	return len(d.RemoveWorkloads)+len(d.RemoveServices)+len(d.RemovePolicies)+
		len(d.Workloads)+len(d.Services)+len(d.Policies) == 0
}

// Workload returns the workload of that UID, or nil.
func (s *Snapshot) Workload(uid string) *Workload {
	w, _ := s.workloads.get(uid)
	return w
}

// WorkloadAt returns the workload that owns an address, or nil. Where several do, a pod wins, then one that speaks
// HBONE.
func (s *Snapshot) WorkloadAt(a NetworkAddr) *Workload {
	ws, _ := s.byAddr.get(a)
	if len(ws) == 0 {
		return nil
	}
	return ws[0]
}

// Pod returns the workload of that namespace and name, or nil. Where several clusters have one, the order of WorkloadAt
// decides.
func (s *Snapshot) Pod(namespace, name string) *Workload {
	ws, _ := s.byPod.get(namespacedName{namespace, name})
	if len(ws) == 0 {
		return nil
	}
	return ws[0]
}

// WorkloadNamed returns a workload that is reached by hostname, or nil.
func (s *Snapshot) WorkloadNamed(hostname string) *Workload {
	ws, _ := s.byName.get(hostname)
	if len(ws) == 0 {
		return nil
	}
	return ws[0]
}

// Service returns the service of that key (namespace/hostname), or nil.
func (s *Snapshot) Service(key string) *Service {
	v, _ := s.services.get(key)
	return v
}

// ServiceAt returns the service a client of a namespace reaches at an address, or nil. One of the client's namespace
// wins, then a canonical one, then the first by key; a single address wins over a range, a longer range over a shorter.
func (s *Snapshot) ServiceAt(a NetworkAddr, clientNamespace string) *Service {
	exact, _ := s.byVIP.get(a)
	if svc := rank(exact, clientNamespace); svc != nil {
		return svc
	}
	if len(s.ranges) == 0 {
		return nil
	}
	return s.serviceInRange(a, clientNamespace)
}

func (s *Snapshot) serviceInRange(a NetworkAddr, clientNamespace string) *Service {
	type order struct{ local, bits, canonical int }
	var best *Service
	var bestOrder order
	for _, svc := range s.ranges {
		bits := longestMatch(svc, a)
		if bits < 0 || !visible(svc, clientNamespace) {
			continue
		}
		o := order{b2i(svc.Namespace == clientNamespace), bits, b2i(svc.Canonical)}
		if best == nil || o.local > bestOrder.local ||
			o.local == bestOrder.local && (o.bits > bestOrder.bits ||
				o.bits == bestOrder.bits && o.canonical > bestOrder.canonical) {
			best, bestOrder = svc, o
		}
	}
	return best
}

func longestMatch(svc *Service, a NetworkAddr) int {
	bits := -1
	for _, v := range svc.VIPs {
		if v.Network == a.Network && v.Prefix.Contains(a.Addr) && v.Prefix.Bits() > bits {
			bits = v.Prefix.Bits()
		}
	}
	return bits
}

// ServiceNamed returns the service a client of a namespace means by a hostname, or nil, by the order of ServiceAt.
func (s *Snapshot) ServiceNamed(hostname, clientNamespace string) *Service {
	svcs, _ := s.byHost.get(hostname)
	return rank(svcs, clientNamespace)
}

// Endpoints returns the endpoints of a service, healthy or not, sorted by workload UID.
func (s *Snapshot) Endpoints(serviceKey string) []Endpoint {
	eps, _ := s.endpoints.get(serviceKey)
	return eps
}

// Find says what an address is to a client of a namespace: a workload first, then a service.
func (s *Snapshot) Find(a NetworkAddr, clientNamespace string) Address {
	if w := s.WorkloadAt(a); w != nil {
		return Address{Workload: w}
	}
	if svc := s.ServiceAt(a, clientNamespace); svc != nil {
		return Address{Service: svc}
	}
	return Address{}
}

// Policy returns the policy of that key (namespace/name), or nil.
func (s *Snapshot) Policy(key string) *Policy {
	p, _ := s.policies.get(key)
	return p
}

// PoliciesFor returns the policies that govern connections to w: the mesh's, its namespace's and those that select it.
// An invalid one counts wherever it is named, since its scope cannot be relied on.
// missing lists the keys among the latter that are not known yet.
func (s *Snapshot) PoliciesFor(w *Workload) (policies []*Policy, missing []string) {
	global, _ := s.inScope.get("")
	policies = append(policies, global...)
	local, _ := s.inScope.get(w.Namespace)
	policies = append(policies, local...)
	for _, key := range w.Policies {
		p, ok := s.policies.get(key)
		if !ok {
			missing = append(missing, key)
			continue
		}
		if p.Scope == ScopeWorkload || p.Invalid != "" {
			policies = append(policies, p)
		}
	}
	return policies, missing
}

// Workloads yields every workload, in no order.
func (s *Snapshot) Workloads() iter.Seq2[string, *Workload] { return s.workloads.all() }

// Services yields every service by its key, in no order.
func (s *Snapshot) Services() iter.Seq2[string, *Service] { return s.services.all() }

// Policies yields every policy by its key, in no order.
func (s *Snapshot) Policies() iter.Seq2[string, *Policy] { return s.policies.all() }

// Counts returns how many workloads, services and policies there are.
func (s *Snapshot) Counts() (workloads, services, policies int) {
	return s.workloads.len(), s.services.len(), s.policies.len()
}

// rank returns the best of services that are sorted by key: of the client's namespace, then canonical, then the first.
func rank(svcs []*Service, clientNamespace string) *Service {
	var best *Service
	bestOrder := -1
	for _, svc := range svcs {
		if !visible(svc, clientNamespace) {
			continue
		}
		if o := 2*b2i(svc.Namespace == clientNamespace) + b2i(svc.Canonical); o > bestOrder {
			best, bestOrder = svc, o
		}
	}
	return best
}

func visible(svc *Service, clientNamespace string) bool {
	return !svc.NamespaceOnly || svc.Namespace == clientNamespace
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Apply returns the snapshot after d. s does not change.
func (s *Snapshot) Apply(d Delta) *Snapshot {
	next := *s
	next.applyWorkloads(d)
	next.applyServices(d)
	next.applyPolicies(d)
	return &next
}

func (s *Snapshot) applyWorkloads(d Delta) {
	if len(d.RemoveWorkloads)+len(d.Workloads) == 0 {
		return
	}
	e := workloadEdit{
		workloads: s.workloads.edit(), byAddr: s.byAddr.edit(), byPod: s.byPod.edit(), byName: s.byName.edit(),
		gone: make(map[string]map[string]bool), come: make(map[string][]Endpoint),
	}
	for _, uid := range d.RemoveWorkloads {
		e.remove(uid)
	}
	for _, w := range lastOf(d.Workloads, func(w *Workload) string { return w.UID }) {
		e.remove(w.UID)
		e.add(w)
	}
	s.workloads, s.byAddr, s.byPod, s.byName = e.workloads.table, e.byAddr.table, e.byPod.table, e.byName.table
	s.endpoints = e.endpoints(s.endpoints.edit())
}

// workloadEdit gathers the changes of one Apply so that each service's endpoints are copied once.
type workloadEdit struct {
	workloads *tableEdit[string, *Workload]
	byAddr    *tableEdit[NetworkAddr, []*Workload]
	byPod     *tableEdit[namespacedName, []*Workload]
	byName    *tableEdit[string, []*Workload]
	gone      map[string]map[string]bool // service key → UIDs that leave it
	come      map[string][]Endpoint      // service key → endpoints that join it
}

func (e *workloadEdit) remove(uid string) {
	w, ok := e.workloads.get(uid)
	if !ok {
		return
	}
	e.workloads.delete(uid)
	for _, a := range indexedAddrs(w) {
		without(e.byAddr, a, w)
	}
	if w.Hostname != "" {
		without(e.byName, w.Hostname, w)
	}
	without(e.byPod, namespacedName{w.Namespace, w.Name}, w)
	for _, sp := range w.Services {
		if e.gone[sp.Service] == nil {
			e.gone[sp.Service] = make(map[string]bool)
		}
		e.gone[sp.Service][uid] = true
	}
}

func (e *workloadEdit) add(w *Workload) {
	e.workloads.set(w.UID, w)
	for _, a := range indexedAddrs(w) {
		with(e.byAddr, a, w, compareWorkloads)
	}
	if w.Hostname != "" {
		with(e.byName, w.Hostname, w, compareWorkloads)
	}
	with(e.byPod, namespacedName{w.Namespace, w.Name}, w, compareWorkloads)
	for _, sp := range w.Services {
		e.come[sp.Service] = append(e.come[sp.Service], Endpoint{Workload: w, Ports: sp.Ports})
	}
}

func (e *workloadEdit) endpoints(t *tableEdit[string, []Endpoint]) table[string, []Endpoint] {
	touched := make(map[string]bool, len(e.gone)+len(e.come))
	for k := range e.gone {
		touched[k] = true
	}
	for k := range e.come {
		touched[k] = true
	}
	for key := range touched {
		old, _ := t.get(key)
		eps := make([]Endpoint, 0, len(old)+len(e.come[key]))
		for _, ep := range old {
			if !e.gone[key][ep.Workload.UID] {
				eps = append(eps, ep)
			}
		}
		eps = append(eps, e.come[key]...)
		if len(eps) == 0 {
			t.delete(key)
			continue
		}
		slices.SortFunc(eps, func(a, b Endpoint) int { return strings.Compare(a.Workload.UID, b.Workload.UID) })
		t.set(key, eps)
	}
	return t.table
}

// indexedAddrs are the addresses that lead to w: none for a workload that shares its node's.
func indexedAddrs(w *Workload) []NetworkAddr {
	if w.HostNetwork {
		return nil
	}
	addrs := make([]NetworkAddr, 0, len(w.Addrs))
	for _, a := range w.Addrs {
		addrs = append(addrs, NetworkAddr{w.Network, a})
	}
	return addrs
}

func compareWorkloads(a, b *Workload) int {
	if d := b2i(isPod(b)) - b2i(isPod(a)); d != 0 {
		return d
	}
	if d := int(b.Protocol) - int(a.Protocol); d != 0 {
		return d
	}
	return strings.Compare(a.UID, b.UID)
}

func isPod(w *Workload) bool { return strings.Contains(w.UID, "//Pod/") }

func (s *Snapshot) applyServices(d Delta) {
	if len(d.RemoveServices)+len(d.Services) == 0 {
		return
	}
	services, byVIP, byHost := s.services.edit(), s.byVIP.edit(), s.byHost.edit()
	ranges := slices.Clone(s.ranges)
	remove := func(key string) {
		svc, ok := services.get(key)
		if !ok {
			return
		}
		services.delete(key)
		without(byHost, svc.Hostname, svc)
		for _, a := range singleVIPs(svc) {
			without(byVIP, a, svc)
		}
		ranges = slices.DeleteFunc(ranges, func(o *Service) bool { return o == svc })
	}
	for _, key := range d.RemoveServices {
		remove(key)
	}
	for _, svc := range lastOf(d.Services, (*Service).Key) {
		remove(svc.Key())
		services.set(svc.Key(), svc)
		with(byHost, svc.Hostname, svc, compareServices)
		for _, a := range singleVIPs(svc) {
			with(byVIP, a, svc, compareServices)
		}
		if slices.ContainsFunc(svc.VIPs, func(v VIP) bool { return !v.Prefix.IsSingleIP() }) {
			ranges = append(ranges, svc)
		}
	}
	slices.SortFunc(ranges, compareServices)
	s.services, s.byVIP, s.byHost, s.ranges = services.table, byVIP.table, byHost.table, ranges
}

func singleVIPs(svc *Service) []NetworkAddr {
	var addrs []NetworkAddr
	for _, v := range svc.VIPs {
		a := NetworkAddr{v.Network, v.Prefix.Addr()}
		if v.Prefix.IsSingleIP() && !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs
}

func compareServices(a, b *Service) int { return strings.Compare(a.Key(), b.Key()) }

func (s *Snapshot) applyPolicies(d Delta) {
	if len(d.RemovePolicies)+len(d.Policies) == 0 {
		return
	}
	policies, inScope := s.policies.edit(), s.inScope.edit()
	remove := func(key string) {
		p, ok := policies.get(key)
		if !ok {
			return
		}
		policies.delete(key)
		if p.Scope != ScopeWorkload {
			without(inScope, scopeKey(p), p)
		}
	}
	for _, key := range d.RemovePolicies {
		remove(key)
	}
	for _, p := range lastOf(d.Policies, (*Policy).Key) {
		remove(p.Key())
		policies.set(p.Key(), p)
		if p.Scope != ScopeWorkload {
			with(inScope, scopeKey(p), p, comparePolicies)
		}
	}
	s.policies, s.inScope = policies.table, inScope.table
}

func scopeKey(p *Policy) string {
	if p.Scope == ScopeGlobal {
		return ""
	}
	return p.Namespace
}

func comparePolicies(a, b *Policy) int { return strings.Compare(a.Key(), b.Key()) }

// lastOf drops all but the last of the values that share a key.
func lastOf[V any](vs []V, key func(V) string) []V {
	last := make(map[string]int, len(vs))
	for i, v := range vs {
		last[key(v)] = i
	}
	if len(last) == len(vs) {
		return vs
	}
	kept := make([]V, 0, len(last))
	for i, v := range vs {
		if last[key(v)] == i {
			kept = append(kept, v)
		}
	}
	return kept
}

// with adds v to the list at k, in a new list kept in order.
func with[K comparable, V any](t *tableEdit[K, []V], k K, v V, compare func(a, b V) int) {
	old, _ := t.get(k)
	list := make([]V, len(old), len(old)+1)
	copy(list, old)
	i, _ := slices.BinarySearchFunc(list, v, compare)
	t.set(k, slices.Insert(list, i, v))
}

// without drops v from the list at k, in a new list.
func without[K, V comparable](t *tableEdit[K, []V], k K, v V) {
	old, _ := t.get(k)
	list := make([]V, 0, len(old))
	for _, o := range old {
		if o != v {
			list = append(list, o)
		}
	}
	if len(list) == 0 {
		t.delete(k)
		return
	}
	t.set(k, list)
}

// Unmap turns an IPv4-mapped IPv6 address into the IPv4 address that every index is keyed by.
func Unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
