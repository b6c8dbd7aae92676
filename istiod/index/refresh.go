package index

import (
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// refresh makes the marked nouns again and notes those that came out different.
func (x *Index) refresh() {
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
	for n := range x.dirty.slices {
		x.refreshSlice(n)
	}
	for n := range x.dirty.pods {
		x.refreshPod(n)
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
	if ap := x.objects.AuthorizationPolicies[n]; ap != nil {
		p, s = translate.Policy(x.cfg, ap)
	}
	x.putPolicy(n.String(), p)
	x.putStatus(AuthorizationPolicy, n, s)
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

func (x *Index) refreshService(n name) {
	var svc *mesh.Service
	var s *translate.Status
	if o := x.objects.Services[n]; o != nil {
		svc, s = translate.Service(x.cfg, o, x.objects.Namespaces[n.Namespace])
	}
	x.putService(translate.ServiceKey(x.cfg, n), svc)
	x.putStatus(Service, n, s)
}

func (x *Index) refreshSlice(n name) {
	var ws []*mesh.Workload
	var s *translate.Status
	if slice := x.objects.EndpointSlices[n]; slice != nil {
		ws, s = translate.Slice(x.cfg, slice, x.objects.Services[translate.ServiceOf(slice)])
	}
	uids := make([]string, 0, len(ws))
	for _, w := range ws {
		uids = append(uids, w.UID)
		x.putWorkload(w.UID, w)
	}
	for _, uid := range x.listed[n] {
		if !slices.Contains(uids, uid) {
			x.putWorkload(uid, nil)
		}
	}
	if len(uids) == 0 {
		delete(x.listed, n)
	} else {
		x.listed[n] = uids
	}
	x.putStatus(EndpointSlice, n, s)
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
	for k, v := range pod.Labels {
		for svc := range x.bySelect[pair{n.Namespace, k, v}] {
			if o := x.objects.Services[svc]; translate.Selects(o.Spec.Selector, pod.Labels) {
				in.Services = append(in.Services, o)
			}
		}
		for _, space := range [...]string{n.Namespace, ""} {
			for policy := range x.byPolicy[pair{space, k, v}] {
				if translate.Attaches(x.cfg, x.objects.AuthorizationPolicies[policy], n.Namespace, pod.Labels) {
					in.Policies = append(in.Policies, policy.String())
				}
			}
		}
	}
	for slice := range x.named[n] {
		o := x.objects.EndpointSlices[slice]
		if svc := x.objects.Services[translate.ServiceOf(o)]; svc != nil && len(svc.Spec.Selector) == 0 {
			in.Slices = append(in.Slices, translate.Backing{Service: svc, Slice: o})
		}
	}
	in.Policies = append(in.Policies, translate.AuthnPolicies(x.cfg, x.levels(n.Namespace, pod.Labels))...)
	return in
}
