package index

import (
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// host is what a service is known by: several objects may declare it, and one of them counts.
type host struct{ namespace, name string }

func (h host) key() string { return mesh.ServiceKey(h.namespace, h.name) }

// entries says who touches whom among ServiceEntries and WorkloadEntries.
type entries struct {
	labels   map[pair]set[name]   // WorkloadEntries by each of their labels
	machines map[string]set[name] // WorkloadEntries by namespace
	bySelect map[pair]set[name]   // ServiceEntries by one pair of their selectors
	byHost   map[host]set[name]   // ServiceEntries by each of their hosts
	inSpace  map[string]set[name] // ServiceEntries by namespace
	listed   map[name][]string    // UIDs of the workloads made from a ServiceEntry
}

func newEntries() entries {
	return entries{labels: make(map[pair]set[name]), machines: make(map[string]set[name]), bySelect: make(map[pair]set[name]),
		byHost: make(map[host]set[name]), inSpace: make(map[string]set[name]), listed: make(map[name][]string)}
}

// markHosts marks an entry's hosts, and every entry that shares one: which of them counts may be another now.
func (x *Index) markHosts(se *translate.ServiceEntry) {
	for _, h := range translate.EntryHosts(se) {
		at := host{se.Namespace, h}
		x.dirty.hosts[at] = struct{}{}
		x.mark(x.dirty.serviceEntries, x.entries.byHost[at])
	}
}

func (x *Index) serviceEntry(n name, now *translate.ServiceEntry) {
	if old := x.objects.ServiceEntries[n]; old != nil {
		x.markHosts(old)
		for _, h := range translate.EntryHosts(old) {
			unlink(x.entries.byHost, host{n.Namespace, h}, n)
		}
		if anchor, ok := anchorOf(n.Namespace, translate.EntrySelector(old)); ok {
			unlink(x.entries.bySelect, anchor, n)
		}
		unlink(x.entries.inSpace, n.Namespace, n)
		x.markSelected(n.Namespace, translate.EntrySelector(old))
	}
	keep(x.objects.ServiceEntries, n, now)
	if now != nil {
		for _, h := range translate.EntryHosts(now) {
			link(x.entries.byHost, host{n.Namespace, h}, n)
		}
		if anchor, ok := anchorOf(n.Namespace, translate.EntrySelector(now)); ok {
			link(x.entries.bySelect, anchor, n)
		}
		link(x.entries.inSpace, n.Namespace, n)
		x.markHosts(now)
		x.markSelected(n.Namespace, translate.EntrySelector(now))
	}
	x.tell(topic{about: aboutEntry, name: n})
	x.ask(asker{ServiceEntry, n}, metaOf(now))
	x.markEntry(n)
}

func (x *Index) workloadEntry(n name, now *networkingv1.WorkloadEntry) {
	if old := x.objects.WorkloadEntries[n]; old != nil {
		for k, v := range translate.EntryLabels(old) {
			unlink(x.entries.labels, pair{n.Namespace, k, v}, n)
		}
		unlink(x.entries.machines, n.Namespace, n)
	}
	keep(x.objects.WorkloadEntries, n, now)
	if now != nil {
		for k, v := range translate.EntryLabels(now) {
			link(x.entries.labels, pair{n.Namespace, k, v}, n)
		}
		link(x.entries.machines, n.Namespace, n)
	}
	x.dirty.workloadEntries[n] = struct{}{}
	x.ask(asker{WorkloadEntry, n}, metaOf(now))
}

// owner is who declares a host: a Service, whose name it returns, or else the oldest ServiceEntry, or neither.
func (x *Index) owner(h host) (svc name, se *translate.ServiceEntry, isService bool) {
	if svc, ok := translate.ServiceOfHost(x.cfg, h.namespace, h.name); ok && translate.HasHost(x.objects.Services[svc]) {
		return svc, nil, true
	}
	for n := range x.entries.byHost[h] {
		se = translate.OlderEntry(se, x.objects.ServiceEntries[n])
	}
	return name{}, se, false
}

func (x *Index) refreshHost(h host) {
	var svc *mesh.Service
	switch n, se, isService := x.owner(h); {
	case isService:
		o := x.objects.Services[n]
		if svc, _ = translate.Service(x.cfg, o, x.objects.Namespaces[h.namespace]); svc != nil {
			x.objects.BindService(x.cfg, &o.ObjectMeta).Set(svc, x.targeting(translate.PolicyTarget{Kind: translate.TargetService, Name: n}))
		}
	case se != nil:
		at := translate.PolicyTarget{Kind: translate.TargetServiceEntry, Name: name{Namespace: se.Namespace, Name: se.Name}}
		svc = x.objects.EntryService(x.cfg, se, h.name, x.targeting(at))
	}
	x.declare(h.key(), svc)
	x.putService(h.key(), svc)
}

func (x *Index) refreshServiceEntry(n name) {
	se := x.objects.ServiceEntries[n]
	if se == nil {
		x.putListed(x.entries.listed, n, nil)
		x.putStatus(ServiceEntry, n, nil)
		x.putConditions(ServiceEntry, n, nil)
		return
	}
	taken := make(map[string]string)
	for _, h := range translate.EntryHosts(se) {
		if _, owner, isService := x.owner(host{n.Namespace, h}); isService {
			taken[h] = translate.TakenByService
		} else if owner != se {
			taken[h] = translate.TakenByEntry(owner)
		}
	}
	ws := translate.EntryWorkloads(x.cfg, se)
	for _, w := range ws {
		w.Waypoint = x.objects.BindWorkload(x.cfg, &se.ObjectMeta)
	}
	x.putListed(x.entries.listed, n, ws)
	x.putConditions(ServiceEntry, n, x.objects.EntryConditions(x.cfg, se))
	x.putStatus(ServiceEntry, n, x.objects.EntryStatus(x.cfg, se, taken))
}

func (x *Index) refreshWorkloadEntry(n name) {
	var w *mesh.Workload
	var s *translate.Status
	if we := x.objects.WorkloadEntries[n]; we != nil {
		in := translate.WorkloadEntryInput{Entry: we, Waypoint: x.objects.BindWorkload(x.cfg, &we.ObjectMeta)}
		in.Services, in.Entries, in.Policies = x.selecting(n.Namespace, translate.EntryLabels(we))
		w, s = translate.WorkloadEntry(x.cfg, in)
	}
	x.putWorkload(translate.WorkloadEntryUID(x.cfg, n), w)
	x.putStatus(WorkloadEntry, n, s)
}
