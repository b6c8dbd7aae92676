package index

import (
	"reflect"

	"github.com/mistnet/mistnet/istiod/translate"
)

// meshConfig takes the mesh's configuration, and marks what may be another thing by it: whoever asks for a waypoint, which may be
// closed without it, what says how services are talked to, and the routes that may say nothing of retries or of who sees them.
func (x *Index) meshConfig(n name, now *translate.MeshConfig) {
	old := x.cfg
	x.objects.MeshConfig, x.cfg = now, x.base.WithMesh(now)
	x.dirty.mesh[n] = struct{}{}
	if reflect.DeepEqual(old, x.cfg) {
		return
	}
	for a := range x.waypoints.asks {
		x.markAsker(a)
	}
	o := &x.objects
	for key := range x.nouns.Services {
		x.traffic.dirtyServices[key] = struct{}{}
	}
	for n := range o.DestinationRules {
		x.traffic.dirtyRules[n] = struct{}{}
	}
	for n := range o.VirtualServices {
		x.dirty.routes[router{VirtualService, n}] = struct{}{}
	}
	for n := range o.HTTPRoutes {
		x.dirty.routes[router{HTTPRoute, n}] = struct{}{}
	}
	for n := range o.GRPCRoutes {
		x.dirty.routes[router{GRPCRoute, n}] = struct{}{}
	}
}

func (x *Index) refreshMesh(n name) {
	var s *translate.Status
	if m := x.objects.MeshConfig; m != nil && m.Namespace == n.Namespace && m.Name == n.Name {
		s = m.Status(x.base)
	}
	x.putStatus(ConfigMap, n, s)
}
