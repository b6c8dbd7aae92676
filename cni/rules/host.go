package rules

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Host is what the machine itself needs so that its probes pass redirection: connections that a local process opens to
// a pod of the mesh leave with an address the pod's rules let by.
type Host struct {
	IPv4, IPv6 HostFamily
	Table      Table // the same for nftables, with a set in it for each family, of the same name
}

// HostFamily is one address family's part.
type HostFamily struct {
	Set    string // ipset of type hash:ip whose members are the enrolled pods' addresses, with the pod's UID as comment
	Chains []Chain
}

// HostProbe returns the host's rules. Zero addresses mean mesh.ProbeAddrIPv4 and IPv6; they must be the ones InPod got.
func HostProbe(ipv4, ipv6 netip.Addr) Host {
	one := func(set string, source string) HostFamily {
		return HostFamily{Set: set, Chains: []Chain{{
			Table: "nat", Name: ChainPostrouting, From: "POSTROUTING", Rules: []Rule{
				rule("-p tcp -m owner --socket-exists -m set --match-set %s dst -j SNAT --to-source %s", set, source),
			},
		}}}
	}
	address := func(prefix string) string { return prefix[:strings.IndexByte(prefix, '/')] }
	const v4, v6 = "istio-inpod-probes-v4", "istio-inpod-probes-v6"
	snat4, snat6 := address(probe(ipv4, mesh.ProbeAddrIPv4)), address(probe(ipv6, mesh.ProbeAddrIPv6))
	return Host{
		IPv4: one(v4, snat4),
		IPv6: one(v6, snat6),
		Table: Table{
			Name: TableNAT,
			Sets: []string{"set " + v4 + " { type ipv4_addr; }", "set " + v6 + " { type ipv6_addr; }"},
			Chains: []NFTChain{{
				// Before others that change the source. A packet of no local process has no user.
				Name: "postrouting", Hook: "type nat hook postrouting priority 99",
				Rules: []string{
					"meta skuid >= 0 ip daddr @" + v4 + " meta l4proto tcp snat ip to " + snat4,
					"meta skuid >= 0 ip6 daddr @" + v6 + " meta l4proto tcp snat ip6 to " + snat6,
				},
			}},
		},
	}
}

// Text renders the host's rules as Ruleset.Text does, each family led by the set it refers to.
func (h Host) Text() string {
	var b strings.Builder
	for _, f := range []struct {
		name, inet string
		HostFamily
	}{{"IPv4", "inet", h.IPv4}, {"IPv6", "inet6", h.IPv6}} {
		fmt.Fprintf(&b, "# %s\nipset create %s hash:ip family %s comment\n", f.name, f.Set, f.inet)
		writeTables(&b, f.Chains)
	}
	return b.String()
}
