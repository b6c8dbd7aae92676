package translate

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mistnet/mistnet/internal/mesh"
)

// ConditionHealthy is the condition by which a WorkloadEntry says that it takes traffic; without it, it does.
const ConditionHealthy = "Healthy"

// WorkloadEntryInput is what the workload of a WorkloadEntry depends on.
type WorkloadEntryInput struct {
	Entry    *networkingv1.WorkloadEntry
	Services []*corev1.Service // those that select it, in any order
	Entries  []*ServiceEntry   // likewise
	Policies []string          // keys of the policies attached to it, in any order

	Waypoint mesh.GatewayAddress // that traffic addressed to it goes through first
}

// EntryLabels are the labels a WorkloadEntry is selected by: those of its spec and its own, which win.
func EntryLabels(we *networkingv1.WorkloadEntry) map[string]string {
	if len(we.Spec.Labels) == 0 {
		return we.Labels
	}
	labels := maps.Clone(we.Spec.Labels)
	maps.Copy(labels, we.Labels)
	return labels
}

// WorkloadEntryUID is the UID of the workload of the WorkloadEntry of that name.
func WorkloadEntryUID(cfg Config, n Name) string {
	return cfg.ClusterID + "/networking.istio.io/WorkloadEntry/" + n.Namespace + "/" + n.Name
}

// WorkloadEntry returns the workload of a WorkloadEntry, or nil when there is no way to reach it.
func WorkloadEntry(cfg Config, in WorkloadEntryInput) (*mesh.Workload, *Status) {
	we := in.Entry
	f := faults{kind: "WorkloadEntry", namespace: we.Namespace, name: we.Name}
	if _, err := entryAddress(we.Spec.Address); err != nil {
		f.add(Unsupported, "left out: %v", err)
		return nil, f.status()
	}
	workloadFaults(&f, "", &we.Spec)
	w := entryWorkload(cfg, Name{we.Namespace, we.Name}, &we.Spec)
	w.UID = WorkloadEntryUID(cfg, Name{we.Namespace, we.Name})
	labels := EntryLabels(we)
	w.Labels = filled(labels)
	w.Protocol, w.NativeTunnel = tunnel(labels, we.Annotations)
	canonical(w, labels)
	w.Policies, w.Waypoint = sortedSet(in.Policies), in.Waypoint
	for _, c := range we.Status.GetConditions() {
		if c.GetType() == ConditionHealthy && c.GetStatus() == string(corev1.ConditionFalse) {
			w.Healthy = false
		}
	}
	var places []mesh.ServicePorts
	for _, svc := range in.Services {
		if HasHost(svc) {
			places = append(places, mesh.ServicePorts{Service: serviceKey(cfg, svc), Ports: selectedPorts(svc, &we.Spec)})
		}
	}
	w.Services = entryPlaces(places, in.Entries, func(p *networkingapi.ServicePort) uint16 { return entryPort(&we.Spec, p.GetName()) })
	return w, f.status()
}

// entryWorkload is what an endpoint of a ServiceEntry and a WorkloadEntry have in common. Its address must be one that
// entryAddress accepts.
func entryWorkload(cfg Config, n Name, we *networkingapi.WorkloadEntry) *mesh.Workload {
	w := &mesh.Workload{
		Name:           n.Name,
		Namespace:      n.Namespace,
		Network:        we.Network,
		TrustDomain:    cfg.TrustDomain,
		ServiceAccount: cmp.Or(we.ServiceAccount, mesh.DefaultServiceAccount),
		ClusterID:      cfg.ClusterID,
		Healthy:        true,
		Capacity:       cmp.Or(we.Weight, 1),
		Kind:           mesh.KindPod, // as Istio sends it
		OwnerName:      n.Name,
	}
	parts := append(strings.SplitN(we.Locality, "/", 3), "", "")
	w.Locality = mesh.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
	if addr, err := entryAddress(we.Address); err == nil && addr.IsValid() {
		w.Addrs = []netip.Addr{addr}
	} else {
		w.Hostname = we.Address
	}
	return w
}

// entryAddress is the address of an entry, or an invalid one when it is a hostname.
func entryAddress(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	switch {
	case err == nil && (a.Zone() != "" || a.IsUnspecified()):
		return netip.Addr{}, fmt.Errorf("address %q is no single host's", text)
	case err == nil:
		return a.Unmap(), nil
	case text == "":
		return netip.Addr{}, errors.New("there is no address, and network gateways are not supported yet")
	case strings.HasPrefix(text, "unix:"):
		return netip.Addr{}, fmt.Errorf("address %q: sockets of a machine cannot be reached through the mesh", text)
	case !isHostname(text):
		return netip.Addr{}, fmt.Errorf("address %q is neither an IP address nor a hostname", text)
	}
	return netip.Addr{}, nil
}

// isHostname accepts dotted labels of letters, digits, - and _ (RFC 1123, 2.1), not all of digits.
func isHostname(text string) bool {
	letters := false
	for label := range strings.SplitSeq(strings.TrimSuffix(text, "."), ".") {
		if label == "" || len(label) > 63 {
			return false
		}
		for _, c := range []byte(label) {
			switch {
			case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c == '-', c == '_':
				letters = true
			case c < '0' || c > '9':
				return false
			}
		}
	}
	return letters && len(text) <= 253
}

// entryPort is the port an entry has under a name, or 0.
func entryPort(we *networkingapi.WorkloadEntry, name string) uint16 {
	if p := we.GetPorts()[name]; p <= 65535 {
		return uint16(p)
	}
	return 0
}

// selectedPorts maps the ports of a Service that selects an entry: named targets by the entry's names, as a pod's.
func selectedPorts(svc *corev1.Service, we *networkingapi.WorkloadEntry) []mesh.Port {
	var ports []mesh.Port
	for _, p := range tcpPorts(svc) {
		target := targetNumber(p)
		if p.TargetPort.Type == intstr.String {
			target = entryPort(we, p.TargetPort.StrVal)
		}
		if target != 0 {
			ports = append(ports, mesh.Port{ServicePort: uint16(p.Port), TargetPort: target})
		}
	}
	return ports
}

// workloadFaults adds what of an endpoint is not served as written.
func workloadFaults(f *faults, path string, we *networkingapi.WorkloadEntry) {
	if we.Network != "" {
		f.add(Unsupported, "%snetwork: %q can be reached from that network only, there are no network gateways yet", path, we.Network)
	}
	for _, name := range slices.Sorted(maps.Keys(we.Ports)) {
		if p := we.Ports[name]; p < 1 || p > 65535 {
			f.add(Invalid, "%sports[%s]: %d is not a port", path, name, p)
		}
	}
}

// faults collects what is wrong with an object, for one status.
type faults struct {
	kind, namespace, name string
	reason                StatusReason
	messages              []string
}

// add records a fault; the status has the gravest of all reasons.
func (f *faults) add(r StatusReason, format string, args ...any) {
	grave := []StatusReason{"", Ignored, Conflicted, Unsupported, BackendNotFound, InvalidKind, RefNotPermitted, Invalid}
	if slices.Index(grave, r) > slices.Index(grave, f.reason) {
		f.reason = r
	}
	f.messages = append(f.messages, fmt.Sprintf(format, args...))
}

func (f *faults) status() *Status {
	if len(f.messages) == 0 {
		return nil
	}
	return &Status{Kind: f.kind, Namespace: f.namespace, Name: f.name, Reason: f.reason, Message: strings.Join(f.messages, "; ")}
}
