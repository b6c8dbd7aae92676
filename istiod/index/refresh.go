package index

import (
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// refresh makes the marked nouns again and notes those that came out different.
func (x *Index) refresh() {
	for n := range x.dirty.mesh {
		x.refreshMesh(n)
	}
	if x.dirty.strict {
		x.refreshStrict()
	}
	for n := range x.dirty.policies {
		x.refreshPolicy(n)
	}
	for n := range x.dirty.authn {
		x.refreshAuthn(n)
	}
	for n := range x.dirty.services {
		x.refreshService(n)
	}
	for h := range x.dirty.hosts {
		x.refreshHost(h)
	}
	x.refreshTraffic()
	x.refreshCredentials()
	for n := range x.dirty.slices {
		x.refreshSlice(n)
	}
	for n := range x.dirty.serviceEntries {
		x.refreshServiceEntry(n)
	}
	for n := range x.dirty.workloadEntries {
		x.refreshWorkloadEntry(n)
	}
	for n := range x.dirty.pods {
		x.refreshPod(n)
	}
	for r := range x.dirty.routes { // which refer to services
		x.refreshRoute(r)
	}
	x.dirty = clean()
}

func (x *Index) refreshStrict() {
	p := translate.StaticStrict(x.cfg)
	if len(x.objects.PeerAuthentications) == 0 {
		x.putPolicy(p.Key(), nil)
		return
	}
	x.putPolicy(p.Key(), p)
}

func (x *Index) refreshPolicy(n name) {
	var p *mesh.Policy
	var s *translate.Status
	var c *translate.Conditions
	if ap := x.objects.AuthorizationPolicies[n]; ap != nil {
		p, s, c = x.objects.Policy(x.cfg, ap)
	}
	x.putPolicy(n.String(), p)
	x.putStatus(AuthorizationPolicy, n, s)
	x.putConditions(AuthorizationPolicy, n, c)
}

func (x *Index) refreshAuthn(n name) {
	var p *mesh.Policy
	var s *translate.Status
	if pa := x.objects.PeerAuthentications[n]; pa != nil {
		p, s = translate.PortPolicy(x.cfg, x.levels(n.Namespace, nil), pa), translate.AuthnStatus(x.cfg, pa)
	}
	x.putPolicy(n.Namespace+"/"+translate.PortPolicyName(n.Name), p)
	x.putStatus(PeerAuthentication, n, s)
}

// levels finds the PeerAuthentications in force for a workload of the namespace with the labels.
func (x *Index) levels(namespace string, labels map[string]string) translate.Levels {
	var l translate.Levels
	for _, pa := range x.authn[x.cfg.RootNamespace] {
		l.Consider(x.cfg, pa, namespace, labels)
	}
	if namespace != x.cfg.RootNamespace {
		for _, pa := range x.authn[namespace] {
			l.Consider(x.cfg, pa, namespace, labels)
		}
	}
	return l
}

// refreshService looks at what is wrong with a service; what it is, refreshHost knows.
func (x *Index) refreshService(n name) {
	var s *translate.Status
	var c *translate.Conditions
	if o := x.objects.Services[n]; o != nil {
		var svc *mesh.Service
		if svc, s = translate.Service(x.cfg, o, x.objects.Namespaces[n.Namespace]); svc != nil {
			b := x.objects.BindService(x.cfg, &o.ObjectMeta)
			c, s = b.Conditions(Service.String(), &o.ObjectMeta), b.Status(Service.String(), &o.ObjectMeta, s)
		}
	}
	x.putStatus(Service, n, s)
	x.putConditions(Service, n, c)
	x.dirty.hosts[host{n.Namespace, translate.Hostname(x.cfg, n)}] = struct{}{}
}

func (x *Index) refreshSlice(n name) {
	var ws []*mesh.Workload
	var s *translate.Status
	if slice := x.objects.EndpointSlices[n]; slice != nil {
		ws, s = translate.Slice(x.cfg, slice, x.objects.Services[translate.ServiceOf(slice)])
	}
	x.putListed(x.listed, n, ws)
	x.putStatus(EndpointSlice, n, s)
}

// putListed puts the workloads made from one object, and takes away those that were.
func (x *Index) putListed(listed map[name][]string, n name, ws []*mesh.Workload) {
	uids := make([]string, 0, len(ws))
	for _, w := range ws {
		uids = append(uids, w.UID)
		x.putWorkload(w.UID, w)
	}
	for _, uid := range listed[n] {
		if !slices.Contains(uids, uid) {
			x.putWorkload(uid, nil)
		}
	}
	if len(uids) == 0 {
		delete(listed, n)
	} else {
		listed[n] = uids
	}
}

func (x *Index) refreshPod(n name) {
	var w *mesh.Workload
	var s *translate.Status
	if pod := x.objects.Pods[n]; pod != nil {
		w, s = translate.Pod(x.cfg, x.podInput(n, pod))
	}
	x.putWorkload(translate.PodUID(x.cfg, n), w)
	x.putStatus(Pod, n, s)
}

func (x *Index) podInput(n name, pod *corev1.Pod) translate.PodInput {
	in := translate.PodInput{Pod: pod, Node: x.objects.Nodes[pod.Spec.NodeName]}
	in.Services, in.Entries, in.Policies = x.selecting(n.Namespace, pod.Labels)
	for slice := range x.named[n] {
		o := x.objects.EndpointSlices[slice]
		if svc := x.objects.Services[translate.ServiceOf(o)]; svc != nil && len(svc.Spec.Selector) == 0 {
			in.Slices = append(in.Slices, translate.Backing{Service: svc, Slice: o})
		}
	}
	x.objects.CompletePod(x.cfg, &in, func(targets []translate.PolicyTarget) []string { return x.targeting(targets...) })
	return in
}

// selecting are the services and entries that select what has the labels, and the keys of the policies it must name.
func (x *Index) selecting(namespace string, labels map[string]string) (services []*corev1.Service, entries []*translate.ServiceEntry, policies []string) {
	for k, v := range labels {
		at := pair{namespace, k, v}
		for n := range x.bySelect[at] {
			if o := x.objects.Services[n]; translate.Selects(o.Spec.Selector, labels) {
				services = append(services, o)
			}
		}
		for n := range x.entries.bySelect[at] {
			if o := x.objects.ServiceEntries[n]; translate.Selects(translate.EntrySelector(o), labels) {
				entries = append(entries, o)
			}
		}
		for _, space := range [...]string{namespace, ""} {
			for n := range x.byPolicy[pair{space, k, v}] {
				if translate.Attaches(x.cfg, x.objects.AuthorizationPolicies[n], namespace, labels) {
					policies = append(policies, n.String())
				}
			}
		}
	}
	return services, entries, append(policies, translate.AuthnPolicies(x.cfg, x.levels(namespace, labels))...)
}
