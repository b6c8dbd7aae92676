package explain

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/yamldir"
)

// idleKinds are kinds of Istio's API that nothing here reads, in yamldir's words, and why.
var idleKinds = map[string]string{
	"extensions.istio.io/TrafficExtension":    "waypoints run no extensions",
	"extensions.istio.io/WasmPlugin":          "waypoints run no extensions",
	"networking.istio.io/EnvoyFilter":         "there is no Envoy here that it could configure",
	"networking.istio.io/Gateway":             "there are no gateways of Istio's kind here; waypoints are Gateways of gateway.networking.k8s.io",
	"networking.istio.io/ProxyConfig":         "a waypoint is set up by what its Gateway's parametersRef names",
	"networking.istio.io/Sidecar":             "there are no sidecars here; exportTo of a VirtualService says which clients it is for",
	"networking.istio.io/WorkloadGroup":       "no WorkloadEntry is made of it; write those themselves",
	"security.istio.io/RequestAuthentication": "tokens are not looked at: nobody is turned away for a bad one",
	"telemetry.istio.io/Telemetry":            "what is logged is said in the mesh's configuration, and metrics are as they are",
}

// idle are the objects below dir that are of such a kind.
func idle(dir string) (all []Problem, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		for _, o := range yamldir.Passed(e.Name(), text) {
			why, ok := idleKinds[o.Key.Kind]
			if !ok {
				continue
			}
			o.Key.Namespace = cmp.Or(o.Key.Namespace, "default")
			object := o.Key.String()
			if strings.HasPrefix(o.File, given) {
				object = fmt.Sprintf("%s:%d %s", ungathered(o.File), o.Line, object)
			}
			all = append(all, Problem{Object: object, Reason: "Ignored", What: "has no effect: " + why})
		}
	}
	return all, nil
}

// missingSubsets are rules that send to a subset which no DestinationRule has. Nothing answers there but 503.
func (m *Mesh) missingSubsets() (all []Problem) {
	have := make(map[string]bool)
	for _, p := range m.nouns.Traffic {
		for _, s := range p.Subsets {
			have[p.Namespace+"/"+p.Hostname+"/"+s.Name] = true
		}
	}
	for _, r := range m.nouns.Routes {
		var said []string
		for _, ref := range refs(r) {
			key := ref.Namespace + "/" + ref.Hostname + "/" + ref.Subset
			if ref.Subset == "" || ref.Invalid != "" || have[key] || slices.Contains(said, key) {
				continue
			}
			said = append(said, key)
			all = append(all, Problem{
				Object: fmt.Sprintf("%s %s/%s", r.Kind, r.Namespace, r.Name), Reason: "SubsetNotFound",
				What: fmt.Sprintf("%s rule %d: no DestinationRule says what subset %s of %s is: its share of the requests is refused",
					r.Protocol, r.Rule, ref.Subset, ref.Hostname),
			})
		}
	}
	return all
}

// refs are all that a rule sends to.
func refs(r *mesh.Route) (all []mesh.BackendRef) {
	if r.HTTP != nil {
		for _, b := range r.HTTP.Backends {
			all = append(all, b.Ref)
		}
		for _, c := range r.HTTP.Mirrors {
			all = append(all, c.Ref)
		}
	}
	if r.Stream != nil {
		for _, b := range r.Stream.Backends {
			all = append(all, b.Ref)
		}
	}
	return all
}
