package rules

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Tables of nftables that are ours, in family inet: both families of addresses at once. On the host only the nat one is.
const (
	TableMangle = "istio-ambient-mangle"
	TableRaw    = "istio-ambient-raw"
	TableNAT    = "istio-ambient-nat"
)

// Table is one table of nftables.
type Table struct {
	Name   string
	Sets   []string // declarations
	Chains []NFTChain
}

// NFTChain is one chain of a table: a base chain when it has a hook.
type NFTChain struct {
	Name  string
	Hook  string // as in `type nat hook output priority dstnat`
	Rules []string
}

// Names of the chains that base chains lead to, and in which the rules are.
const (
	nftPrerouting = "istio-prerouting"
	nftOutput     = "istio-output"
)

// nft returns the meaning of chains in the language of nftables. Every table has both pairs of chains, whatever the
// options, so that one option set takes another's place at once: chains are filled anew and none is left over.
func nft(o Options) []Table {
	v4, v6 := probe(o.ProbeIPv4, mesh.ProbeAddrIPv4), probe(o.ProbeIPv6, mesh.ProbeAddrIPv6)
	tables := []Table{nftTable(TableMangle, "filter", "route", "mangle", []string{
		mark("meta mark", mesh.MarkZtunnel) + fmt.Sprintf(" ct mark set ct mark & %#x | %#x", ^uint32(mesh.MarkMask), mesh.MarkTProxy),
	}, []string{
		mark("ct mark", mesh.MarkTProxy) + " meta mark set ct mark",
	})}
	if o.DNS {
		tables = append(tables, nftTable(TableRaw, "filter", "filter", "raw",
			[]string{"udp sport 53 " + notZtunnel + " ct zone set 1"},
			[]string{"udp dport 53 " + mark("meta mark", mesh.MarkZtunnel) + " ct zone set 1"}))
	}
	var in []string
	for _, dev := range o.VirtualInterfaces {
		in = append(in,
			fmt.Sprintf("iifname %q meta l4proto tcp redirect to :%d", dev, mesh.PortOutbound),
			fmt.Sprintf("iifname %q meta l4proto tcp return", dev))
	}
	if !o.Ingress {
		redirect := fmt.Sprintf(" tcp dport != %d %s redirect to :%d", mesh.PortHBONE, notZtunnel, mesh.PortPassthrough)
		in = append(in,
			"ip saddr "+bare(v4)+" meta l4proto tcp accept",
			"ip6 saddr "+bare(v6)+" meta l4proto tcp accept",
			"ip daddr != 127.0.0.1"+redirect,
			"ip6 daddr != ::1"+redirect)
	}
	out := []string{
		"ip daddr " + bare(v4) + " meta l4proto tcp accept",
		"ip6 daddr " + bare(v6) + " meta l4proto tcp accept",
	}
	if o.DNS {
		redirect := fmt.Sprintf("dport 53 %s redirect to :%d", notZtunnel, mesh.PortDNS)
		out = append(out,
			`oifname != "lo" udp `+redirect,
			"ip daddr != 127.0.0.1 tcp "+redirect,
			"ip6 daddr != ::1 tcp "+redirect)
	}
	redirect := fmt.Sprintf(" meta l4proto tcp %s redirect to :%d", notZtunnel, mesh.PortOutbound)
	out = append(out,
		"meta l4proto tcp "+mark("meta mark", mesh.MarkTProxy)+" accept",
		`ip daddr != 127.0.0.1 oifname "lo" accept`,
		`ip6 daddr != ::1 oifname "lo" accept`,
		"ip daddr != 127.0.0.1"+redirect,
		"ip6 daddr != ::1"+redirect)
	if o.Joined {
		out = append([]string{nftUnderWay}, out...)
		if len(in) > 0 {
			in = append([]string{nftUnderWay}, in...)
		}
	}
	return append(tables, nftTable(TableNAT, "nat", "nat", "dstnat", in, out))
}

// nftTable has a pair of base chains, which lead to a pair that has the rules. Priorities are by name, except that of
// output, for which older programs have no name.
func nftTable(name, prerouting, output, priority string, in, out []string) Table {
	number := map[string]string{"raw": "-300", "mangle": "-150", "dstnat": "-100"}[priority]
	return Table{Name: name, Chains: []NFTChain{
		{Name: nftPrerouting, Rules: in},
		{Name: nftOutput, Rules: out},
		{Name: "prerouting", Hook: "type " + prerouting + " hook prerouting priority " + number, Rules: []string{"jump " + nftPrerouting}},
		{Name: "output", Hook: "type " + output + " hook output priority " + number, Rules: []string{"jump " + nftOutput}},
	}}
}

const nftUnderWay = "tcp flags & (fin | syn | rst | ack) != syn return" // as underWay

var notZtunnel = fmt.Sprintf("meta mark & %#x != %#x", mesh.MarkMask, mesh.MarkZtunnel)

func mark(of string, is uint32) string { return fmt.Sprintf("%s & %#x == %#x", of, mesh.MarkMask, is) }

func bare(prefix string) string { return netip.MustParsePrefix(prefix).Addr().String() }

// NFT is a script for nft -f that makes the tables what they should be, all of them at once, and takes away tables of ours
// that are not among them.
func NFT(tables []Table) string {
	var b strings.Builder
	for _, name := range []string{TableMangle, TableRaw, TableNAT} {
		wanted := false
		for _, t := range tables {
			wanted = wanted || t.Name == name
		}
		fmt.Fprintf(&b, "add table inet %s\n", name) // so that what follows is no error
		if wanted {
			fmt.Fprintf(&b, "flush table inet %s\n", name)
		} else {
			fmt.Fprintf(&b, "delete table inet %s\n", name)
		}
	}
	for _, t := range tables {
		fmt.Fprintf(&b, "table inet %s {\n", t.Name)
		for _, s := range t.Sets {
			fmt.Fprintf(&b, "\t%s\n", s)
		}
		for _, c := range t.Chains {
			fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
			if c.Hook != "" {
				fmt.Fprintf(&b, "\t\t%s; policy accept;\n", c.Hook)
			}
			for _, r := range c.Rules {
				fmt.Fprintf(&b, "\t\t%s\n", r)
			}
			b.WriteString("\t}\n")
		}
		b.WriteString("}\n")
	}
	return b.String()
}

// NFTRedirection returns the chains of TableNAT that redirect. Emptying them ends redirection and leaves what connections that
// were redirected need: the table, without which the kernel forgets about them, and marks.
func NFTRedirection() []string { return []string{nftPrerouting, nftOutput} }
