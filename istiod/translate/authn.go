package translate

import (
	"cmp"
	"fmt"
	"slices"

	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// A PeerAuthentication says whether callers must show an identity. Node proxies accept callers with and without one,
// so only STRICT needs telling them, and it is told as policies that deny callers without an identity: one for all,
// istio_converted_static_strict, which strict workloads name; and, where ports differ from their workload, one made
// for that PeerAuthentication.

// portPolicyPrefix makes names that no object can have: an underscore is not allowed there.
const portPolicyPrefix = "converted_peer_authentication_"

// PortPolicyName is what the policy made for the PeerAuthentication of that name is called.
func PortPolicyName(pa string) string { return portPolicyPrefix + pa }

// Levels are the PeerAuthentications that decide about one workload: the oldest of the mesh, of its namespace, and of
// those that select it. Any may be nil. What a lower one leaves unset it takes from the next higher.
type Levels struct {
	Mesh, Namespace, Workload *securityv1.PeerAuthentication
}

// Consider puts pa where it belongs if it is for a workload of the namespace with the labels and older than the one
// that is there.
func (l *Levels) Consider(cfg Config, pa *securityv1.PeerAuthentication, namespace string, labels map[string]string) {
	switch {
	case IsPlain(pa) && pa.Namespace == cfg.RootNamespace:
		l.Mesh = older(l.Mesh, pa)
	case pa.Namespace != namespace || pa.Namespace == cfg.RootNamespace:
	case IsPlain(pa):
		l.Namespace = older(l.Namespace, pa)
	case Selects(pa.Spec.GetSelector().GetMatchLabels(), labels):
		l.Workload = older(l.Workload, pa)
	}
}

// IsPlain reports whether pa is for a whole namespace or mesh.
func IsPlain(pa *securityv1.PeerAuthentication) bool {
	return len(pa.Spec.GetSelector().GetMatchLabels()) == 0
}

// older returns the one that was created first; where nobody recorded that, the first by name.
func older(a, b *securityv1.PeerAuthentication) *securityv1.PeerAuthentication {
	if a == nil {
		return b
	}
	if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c < 0 || c == 0 && cmp.Compare(a.Name, b.Name) <= 0 {
		return a
	}
	return b
}

// strict reports whether callers need an identity where no port says otherwise.
func (l Levels) strict() bool {
	for _, pa := range []*securityv1.PeerAuthentication{l.Workload, l.Namespace, l.Mesh} {
		if pa == nil {
			continue
		}
		if mode := pa.Spec.GetMtls().GetMode(); mode != securityapi.PeerAuthentication_MutualTLS_UNSET {
			return mode == securityapi.PeerAuthentication_MutualTLS_STRICT
		}
	}
	return false
}

// exceptions are the ports, in order, that the workload's own PeerAuthentication treats otherwise than the rest.
func (l Levels) exceptions() []uint16 {
	if l.Workload == nil {
		return nil
	}
	strict := l.strict()
	var ports []uint16
	for port, mtls := range l.Workload.Spec.GetPortLevelMtls() {
		mode := mtls.GetMode()
		if mode == securityapi.PeerAuthentication_MutualTLS_UNSET || port == 0 || port > 65535 {
			continue
		}
		if (mode == securityapi.PeerAuthentication_MutualTLS_STRICT) != strict {
			ports = append(ports, uint16(port))
		}
	}
	slices.Sort(ports)
	return ports
}

// AuthnPolicies are the keys of the policies that a workload under these levels must name.
func AuthnPolicies(cfg Config, l Levels) []string {
	switch {
	case len(l.exceptions()) > 0:
		return []string{l.Workload.Namespace + "/" + PortPolicyName(l.Workload.Name)}
	case l.strict():
		return []string{cfg.RootNamespace + "/" + mesh.StaticStrictPolicy}
	}
	return nil
}

// nobody matches a caller without an identity.
func nobody() []mesh.StringMatch { return []mesh.StringMatch{{Kind: mesh.MatchPresence}} }

// StaticStrict is the policy that denies every caller without an identity. It is there when any PeerAuthentication is.
func StaticStrict(cfg Config) *mesh.Policy {
	return &mesh.Policy{
		Namespace: cfg.RootNamespace, Name: mesh.StaticStrictPolicy, Scope: mesh.ScopeWorkload, Action: mesh.Deny,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: nobody()}}}}}},
	}
}

// PortPolicy is the policy made for a PeerAuthentication some of whose ports differ from the rest, or nil when none
// does. above are the levels of its namespace.
func PortPolicy(cfg Config, above Levels, pa *securityv1.PeerAuthentication) *mesh.Policy {
	if IsPlain(pa) || pa.Namespace == cfg.RootNamespace {
		return nil
	}
	l := Levels{Mesh: above.Mesh, Namespace: above.Namespace, Workload: pa}
	ports := l.exceptions()
	if len(ports) == 0 {
		return nil
	}
	p := &mesh.Policy{Namespace: pa.Namespace, Name: PortPolicyName(pa.Name), Scope: mesh.ScopeWorkload, Action: mesh.Deny}
	clauses := []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: nobody(), DestinationPorts: ports}}}}
	if l.strict() {
		clauses = []mesh.Clause{
			{Matches: []mesh.Match{{NotPrincipals: nobody()}}},
			{Matches: []mesh.Match{{NotDestPorts: ports}}},
		}
	}
	p.Groups = []mesh.Group{{Clauses: clauses}}
	return p
}

// AuthnStatus says what of a PeerAuthentication has no effect, or nil.
func AuthnStatus(cfg Config, pa *securityv1.PeerAuthentication) *Status {
	status := func(r StatusReason, format string, args ...any) *Status {
		return &Status{Kind: "PeerAuthentication", Namespace: pa.Namespace, Name: pa.Name, Reason: r,
			Message: fmt.Sprintf(format, args...)}
	}
	ports := pa.Spec.GetPortLevelMtls()
	if !IsPlain(pa) && pa.Namespace == cfg.RootNamespace {
		return status(Ignored, "a selector in the root namespace %s selects nothing", cfg.RootNamespace)
	}
	if IsPlain(pa) && len(ports) > 0 {
		return status(Ignored, "portLevelMtls has no effect without a selector")
	}
	for port := range ports {
		if port == 0 || port > 65535 {
			return status(Invalid, "portLevelMtls: there is a number that is not a port, which has no effect")
		}
	}
	return nil
}
