package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Chain names, the same in every table.
const (
	ChainPrerouting  = "ISTIO_PRERT"
	ChainOutput      = "ISTIO_OUTPUT"
	ChainPostrouting = "ISTIO_POSTRT"
)

// Options are what may differ from pod to pod.
type Options struct {
	DNS     bool // queries to port 53 go to ztunnel's DNS proxy
	Ingress bool // inbound plaintext is not captured (ambient.istio.io/bypass-inbound-capture)

	// VirtualInterfaces are devices of the pod behind which other machines live: what comes in there is outbound
	// traffic of the pod (istio.io/reroute-virtual-interfaces).
	VirtualInterfaces []string

	// Joined says that the pod ran before it was captured: connections that are older than the rules are let by. The
	// price is that a captured one of which the kernel loses track cannot be told from these: it ends, and what the pod
	// sends on it until its peer says so is in the clear. In other pods it is captured again and goes on.
	Joined bool

	// ProbeIPv4 and ProbeIPv6 are where the host's probes come from; zero means mesh.ProbeAddrIPv4 and IPv6.
	ProbeIPv4, ProbeIPv6 netip.Addr
}

// Ruleset is everything redirection needs in one network namespace.
//
// Chains and Tables mean the same, to iptables and to nftables: a namespace gets one of them, and the routes.
type Ruleset struct {
	IPv4, IPv6 []Chain // in the order they are to be connected
	Tables     []Table
	Routes     []Route
}

// Chain is one chain of ours: rules in order, entered from a built-in chain of the same table.
type Chain struct {
	Table string // raw, mangle or nat
	Name  string
	From  string // the built-in chain whose first rule jumps here
	Rules []Rule
}

// Rule is one rule in iptables' own words, spelled as `iptables -S` prints it after "-A chain".
type Rule []string

func (r Rule) String() string { return strings.Join(r, " ") }

// Jump is the rule of c.From that enters the chain.
func (c Chain) Jump() Rule { return Rule{"-j", c.Name} }

// Route says that packets with a mark are delivered locally, whatever their destination.
type Route struct {
	IPv6       bool
	Mark, Mask uint32
	Preference int // of the ip rule; lower is asked first
	Table      int
	Device     string
}

// Destination is every address of the route's family.
func (r Route) Destination() netip.Prefix {
	if r.IPv6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// InPod returns what redirection needs in the namespace of a pod.
//
// The chains are in the order they must be connected: the marks first and the redirections last, so that no connection
// is captured before ztunnel's own can be told apart from it.
func InPod(o Options) Ruleset {
	return Ruleset{
		IPv4:   chains(o, family{probe: probe(o.ProbeIPv4, mesh.ProbeAddrIPv4), loopback: "127.0.0.1/32"}),
		IPv6:   chains(o, family{probe: probe(o.ProbeIPv6, mesh.ProbeAddrIPv6), loopback: "::1/128"}),
		Tables: nft(o),
		Routes: []Route{
			{Mark: mesh.MarkTProxy, Mask: mesh.MarkMask, Preference: mesh.RulePref, Table: mesh.RouteTable, Device: "lo"},
			{
				IPv6: true,
				Mark: mesh.MarkTProxy, Mask: mesh.MarkMask, Preference: mesh.RulePref, Table: mesh.RouteTable, Device: "lo",
			},
		},
	}
}

type family struct{ probe, loopback string }

func probe(a netip.Addr, otherwise string) string {
	if !a.IsValid() {
		a = netip.MustParseAddr(otherwise)
	}
	return netip.PrefixFrom(a, a.BitLen()).String()
}

func chains(o Options, f family) []Chain {
	cs := []Chain{
		{Table: "mangle", Name: ChainPrerouting, From: "PREROUTING", Rules: []Rule{
			rule("-m mark --mark %s -j CONNMARK --set-xmark %s", ztunnelMark, tproxyMark),
		}},
		{Table: "mangle", Name: ChainOutput, From: "OUTPUT", Rules: []Rule{
			rule("-m connmark --mark %s -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", tproxyMark),
		}},
	}
	if o.DNS {
		// A query and its forwarded twin may share addresses and ports: a zone of its own keeps the two apart.
		cs = append(cs,
			Chain{Table: "raw", Name: ChainPrerouting, From: "PREROUTING", Rules: []Rule{
				rule("-p udp -m mark ! --mark %s -m udp --sport 53 -j CT --zone 1", ztunnelMark),
			}},
			Chain{Table: "raw", Name: ChainOutput, From: "OUTPUT", Rules: []Rule{
				rule("-p udp -m mark --mark %s -m udp --dport 53 -j CT --zone 1", ztunnelMark),
			}})
	}
	var first []Rule
	if o.Joined {
		first = []Rule{underWay}
	}
	if in := inbound(o, f); len(in) > 0 {
		cs = append(cs, Chain{Table: "nat", Name: ChainPrerouting, From: "PREROUTING", Rules: slices.Concat(first, in)})
	}
	return append(cs, Chain{Table: "nat", Name: ChainOutput, From: "OUTPUT", Rules: slices.Concat(first, outbound(o, f))})
}

// underWay lets TCP connections by that are older than the rules. A namespace tracks no connections before its first
// rule, and then takes up those it has at any packet, as new ones: what does not begin with a SYN must not be redirected.
var underWay = rule("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN")

func inbound(o Options, f family) []Rule {
	var rs []Rule
	for _, dev := range o.VirtualInterfaces {
		rs = append(rs,
			rule("-i %s -p tcp -j REDIRECT --to-ports %d", dev, mesh.PortOutbound),
			rule("-i %s -p tcp -j RETURN", dev))
	}
	if o.Ingress {
		return rs
	}
	return append(rs,
		rule("-s %s -p tcp -m tcp -j ACCEPT", f.probe),
		rule("! -d %s -p tcp -m tcp ! --dport %d -m mark ! --mark %s -j REDIRECT --to-ports %d",
			f.loopback, mesh.PortHBONE, ztunnelMark, mesh.PortPassthrough))
}

func outbound(o Options, f family) []Rule {
	rs := []Rule{rule("-d %s -p tcp -m tcp -j ACCEPT", f.probe)}
	if o.DNS {
		rs = append(rs,
			rule("! -o lo -p udp -m mark ! --mark %s -m udp --dport 53 -j REDIRECT --to-ports %d",
				ztunnelMark, mesh.PortDNS),
			rule("! -d %s -p tcp -m tcp --dport 53 -m mark ! --mark %s -j REDIRECT --to-ports %d",
				f.loopback, ztunnelMark, mesh.PortDNS))
	}
	return append(rs,
		rule("-p tcp -m mark --mark %s -j ACCEPT", tproxyMark),
		rule("! -d %s -o lo -j ACCEPT", f.loopback),
		rule("! -d %s -p tcp -m mark ! --mark %s -j REDIRECT --to-ports %d", f.loopback, ztunnelMark, mesh.PortOutbound))
}

var (
	ztunnelMark = hex(mesh.MarkZtunnel) + "/" + hex(mesh.MarkMask)
	tproxyMark  = hex(mesh.MarkTProxy) + "/" + hex(mesh.MarkMask)
)

func hex(v uint64) string { return "0x" + strconv.FormatUint(v, 16) }

// rule splits at spaces: a device's name, the only part that comes from outside, holds none (ParseInterfaces).
func rule(format string, args ...any) Rule { return strings.Fields(fmt.Sprintf(format, args...)) }

// ParseInterfaces reads the value of the annotation istio.io/reroute-virtual-interfaces: names separated by commas.
// Names no device can have are left out: the kernel takes 1 to 15 bytes without '/' and white space, and a leading '-'
// or '!' would read as something else in a rule.
func ParseInterfaces(csv string) []string {
	var names []string
	for name := range strings.SplitSeq(csv, ",") {
		name = strings.TrimSpace(name)
		if name == "" || len(name) > 15 || name == "." || name == ".." || strings.HasPrefix(name, "-") ||
			strings.ContainsAny(name, "/!+ \t\n\"'\\") || slices.Contains(names, name) {
			continue
		}
		names = append(names, name)
	}
	return names
}

// Same reports whether two rules mean the same, however the tool that printed them spells it: some versions leave out
// a match that says nothing new (-m tcp) or a mask that is full.
func Same(a, b Rule) bool { return slices.Equal(canonical(a), canonical(b)) }

func canonical(r Rule) Rule {
	var out Rule
	for i := 0; i < len(r); i++ {
		next := ""
		if i+1 < len(r) {
			next = r[i+1]
		}
		switch {
		case r[i] == "-m" && (next == "tcp" || next == "udp"):
			i++
		case (r[i] == "--nfmask" || r[i] == "--ctmask") && next == "0xffffffff":
			i++
		default:
			out = append(out, r[i])
		}
	}
	return out
}

// Text renders the rule set as iptables-save would print it, then the routes as ip(8) would. It is what the golden
// files hold and what an operator compares with a pod.
func (rs Ruleset) Text() string {
	var b strings.Builder
	for _, f := range []struct {
		name   string
		chains []Chain
	}{{"IPv4", rs.IPv4}, {"IPv6", rs.IPv6}} {
		fmt.Fprintf(&b, "# %s\n", f.name)
		writeTables(&b, f.chains)
	}
	for _, r := range rs.Routes {
		ip := "ip"
		if r.IPv6 {
			ip = "ip -6"
		}
		fmt.Fprintf(&b, "%s rule add fwmark %#x/%#x pref %d lookup %d\n", ip, r.Mark, r.Mask, r.Preference, r.Table)
		fmt.Fprintf(&b, "%s route add local %s dev %s table %d\n", ip, r.Destination(), r.Device, r.Table)
	}
	return b.String()
}

func writeTables(b *strings.Builder, chains []Chain) {
	for i := 0; i < len(chains); {
		table := chains[i].Table
		n := i
		for n < len(chains) && chains[n].Table == table {
			n++
		}
		fmt.Fprintf(b, "*%s\n", table)
		for _, c := range chains[i:n] {
			fmt.Fprintf(b, ":%s - [0:0]\n", c.Name)
		}
		for _, c := range chains[i:n] {
			for _, r := range c.Rules {
				fmt.Fprintf(b, "-A %s %s\n", c.Name, r)
			}
		}
		for _, c := range chains[i:n] {
			fmt.Fprintf(b, "-I %s 1 %s\n", c.From, c.Jump())
		}
		b.WriteString("COMMIT\n")
		i = n
	}
}
