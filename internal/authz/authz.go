// Package authz decides whether a connection or request may be made: authorization policies, compiled once, checked per
// connection, or per request where requests can be seen.
//
// It hides how policies are indexed so that thousands of them cost little. It knows nothing of where policies come from
// or which of them govern a workload: that is mesh.Snapshot.PoliciesFor. It is pure, and Check allocates nothing.
package authz

import (
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Request is the connection to decide on.
type Request struct {
	Peer mesh.Identity  // who calls, as proven by TLS; zero for a plaintext caller
	Src  netip.AddrPort // where the TCP connection comes from
	Dst  netip.AddrPort // what it will reach: the application's address and port, never the tunnel's
	HTTP *HTTP          // nil: a connection, of whatever protocol
}

// HTTP is the request to decide on.
type HTTP struct {
	Method string
	Host   string // :authority or Host
	Path   string // normalised, without the query
	Header Header // nil: none
}

// Header is the headers of a request.
type Header interface {
	// Value returns the values of a header, its name in lower case, joined with ",", and whether there is any.
	Value(name string) (string, bool)
	// Line returns the value of the i-th header of that name.
	Line(name string, i int) (string, bool)
}

// Decision is the answer to a Request. The zero value denies.
type Decision struct {
	Allow  bool
	Policy string // namespace/name of the policy that decided; "" when it was the absence of one
	Why    Reason
	DryRun DryRun
}

// Reason is why a Decision came out as it did.
type Reason uint8

// The reasons.
const (
	ReasonUnknown  Reason = iota
	NoAllowPolicy         // allowed: nothing denies it and there is no ALLOW policy to pass
	AllowPolicy           // allowed by Decision.Policy
	DenyPolicy            // denied by Decision.Policy
	NoAllowMatches        // denied: there are ALLOW policies and none matches
	InvalidPolicy         // denied: Decision.Policy could not be understood
)

func (r Reason) String() string {
	switch r {
	case NoAllowPolicy:
		return "no allow policy"
	case AllowPolicy:
		return "allow policy"
	case DenyPolicy:
		return "deny policy"
	case NoAllowMatches:
		return "no allow policy matches"
	case InvalidPolicy:
		return "invalid policy"
	case ReasonUnknown:
	}
	return "unknown"
}

// DryRun is what policies that are only being tried out would have said. It never changes Decision.Allow.
//
// A dry-run DENY policy is always consulted; dry-run ALLOW policies only when no enforced policy denies.
type DryRun struct {
	Deny     string // the first dry-run DENY policy that matches
	Allow    string // the first dry-run ALLOW policy that matches
	NotAllow bool   // there are dry-run ALLOW policies and none matches
}

// IsZero reports whether no dry-run policy had anything to say.
func (d DryRun) IsZero() bool { return d == DryRun{} }

// Set is the policies that govern one workload, compiled. It is immutable. A nil Set holds no policies.
type Set struct {
	dryDeny, deny, dryAllow, allow list
}

// Check decides on r. The order is Istio's: DENY first, then ALLOW, then the default, which is to allow only where no
// ALLOW policy exists. Within one action the policy named is the first in the order given to Compile. It does not
// allocate.
func (s *Set) Check(r *Request) Decision {
	if s == nil {
		return Decision{Allow: true, Why: NoAllowPolicy}
	}
	c := connection{peer: r.Peer, known: !r.Peer.IsZero(), src: plain(r.Src.Addr()), dst: plain(r.Dst.Addr()), port: r.Dst.Port(), http: r.HTTP}
	var d Decision
	c.unseen = true // to DENY policies, what cannot be seen is what they deny
	if p := s.dryDeny.first(&c); p != nil {
		d.DryRun.Deny = p.key
	}
	if p := s.deny.first(&c); p != nil {
		d.Policy, d.Why = p.key, DenyPolicy
		if p.invalid {
			d.Why = InvalidPolicy
		}
		return d
	}
	c.unseen = false
	if p := s.dryAllow.first(&c); p != nil {
		d.DryRun.Allow = p.key
	} else {
		d.DryRun.NotAllow = len(s.dryAllow.policies) > 0
	}
	if len(s.allow.policies) == 0 {
		d.Allow, d.Why = true, NoAllowPolicy
		return d
	}
	if p := s.allow.first(&c); p != nil {
		d.Allow, d.Policy, d.Why = true, p.key, AllowPolicy
		return d
	}
	d.Why = NoAllowMatches
	return d
}

// Len returns how many policies the set holds.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	return len(s.dryDeny.policies) + len(s.deny.policies) + len(s.dryAllow.policies) + len(s.allow.policies)
}

// plain is the form every compiled prefix is in: IPv4 is never mapped into IPv6, and there is no zone, which would keep
// a link-local address from matching any prefix.
func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }
