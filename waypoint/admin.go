package waypoint

import (
	"maps"
	"slices"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

// dump is what /config_dump shows.
type dump struct {
	Version         string                     `json:"version"`
	Gateway         string                     `json:"gateway"`
	Identity        string                     `json:"identity"`
	Self            *mesh.Workload             `json:"self"`
	MissingPolicies []string                   `json:"missingPolicies,omitempty"`
	Services        []*mesh.Service            `json:"services"` // bound to this waypoint
	Policies        []*mesh.Policy             `json:"policies"`
	Routes          []*mesh.Route              `json:"routes"`
	Problems        []string                   `json:"problems,omitempty"`
	TrafficPolicies []*mesh.TrafficPolicy      `json:"trafficPolicies"`
	Clusters        []upstream.ClusterDump     `json:"clusters"` // what has been talked to lately
	Certificates    []identity.CertificateInfo `json:"certificates"`
	HTTPConnections httpConnections            `json:"httpConnections"` // of clients, tunnels counted each
}

// httpConnections counts them.
type httpConnections struct {
	Serving int `json:"serving"`
	Parked  int `json:"parked"` // waiting for a request, without a goroutine
}

func (w *Waypoint) dump() dump {
	v := w.state.load()
	d := dump{
		Version: daemon.Version(), Gateway: w.cfg.Namespace + "/" + w.cfg.Gateway, Identity: w.cfg.identity().String(),
		Self: v.Self, MissingPolicies: v.missingPolicies(), Certificates: w.ids.Certificates(),
		Services: []*mesh.Service{}, Policies: []*mesh.Policy{}, Routes: sorted(v.routes), TrafficPolicies: sorted(v.Traffic),
		Clusters: w.up.Dump(time.Now()), HTTPConnections: httpConnections{w.sessions.count(), w.lot.Waiting()},
	}
	services := make(map[string]*mesh.Service)
	for key, svc := range v.Services() {
		if w.state.serves(v, svc) {
			services[key] = svc
		}
	}
	d.Services = sorted(services)
	keys := ownPolicies(v.Self)
	for _, svc := range d.Services {
		keys = mergeKeys(keys, svc.Policies)
	}
	for _, key := range keys {
		if p := v.Policy(key); p != nil {
			d.Policies = append(d.Policies, p)
		}
	}
	for _, p := range v.problems {
		d.Problems = append(d.Problems, p.String())
	}
	return d
}

// sorted are the values of a map in the order of their keys.
func sorted[V any](m map[string]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}
