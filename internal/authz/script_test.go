package authz_test

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

// The language of the scripts:
//
//	policy <namespace>/<name> deny|allow [dry-run] [invalid=<why>] [action=<n>]
//	rule
//	clause
//	match namespaces=a,b* principals=… accounts=ns/name sources=10.0.0.0/8 dests=… ports=80,90 (and not-… of each)
//	      methods=GET paths=/a* hosts=h header.x-name=v (and not-… of each)
//	---- prints what Compile says of the policy, "ok" when nothing
//
//	check [peer=<principal>] [src=<addr:port>] dst=<addr:port> [method=GET path=/a host=h [header.x-name=v]]
//
// A string is exact, or a prefix when it ends in *, a suffix when it begins with *, a path template after template:, and *
// alone is presence.
func TestScripts(t *testing.T) {
	meshtest.RunScripts(t, "testdata/*.txt", func(*testing.T) func(*meshtest.Directive) string {
		var policies []*mesh.Policy
		return func(d *meshtest.Directive) string {
			switch d.Command {
			case "policy":
				p := readPolicy(d)
				policies = append(policies, p)
				if _, err := authz.Compile([]*mesh.Policy{p}); err != nil {
					return err.Error()
				}
				return "ok"
			case "check":
				set, _ := authz.Compile(policies)
				r := authz.Request{Peer: d.Identity(d.Get("peer")), Src: netip.MustParseAddrPort("10.9.9.9:4000"), Dst: d.AddrPort("dst")}
				if d.Has("src") {
					r.Src = d.AddrPort("src")
				}
				if d.Has("method") {
					r.HTTP = &authz.HTTP{Method: d.Get("method"), Path: d.Get("path"), Host: d.Get("host"), Header: headers{}}
					if v := d.Get("header.x-name"); v != "" {
						r.HTTP.Header = headers{"x-name": v}
					}
				}
				return sayDecision(set.Check(&r))
			}
			d.Fatalf("no such directive")
			return ""
		}
	})
}

func sayDecision(d authz.Decision) string {
	verb := "deny"
	if d.Allow {
		verb = "allow"
	}
	s := fmt.Sprintf("%s: %v", verb, d.Why)
	if d.Policy != "" {
		s += " " + d.Policy
	}
	if d.DryRun.Deny != "" {
		s += "\ndry run: would deny: " + d.DryRun.Deny
	}
	if d.DryRun.Allow != "" {
		s += "\ndry run: would allow: " + d.DryRun.Allow
	}
	if d.DryRun.NotAllow {
		s += "\ndry run: no allow policy matches"
	}
	return s
}

func readPolicy(d *meshtest.Directive) *mesh.Policy {
	ns, name, _ := strings.Cut(d.Word(0), "/")
	p := &mesh.Policy{Namespace: ns, Name: name, DryRun: d.Has("dry-run"), Invalid: d.Get("invalid")}
	if d.Has("deny") {
		p.Action = mesh.Deny
	} else if !d.Has("allow") && !d.Has("action") {
		d.Fatalf("neither deny nor allow")
	}
	if d.Has("action") {
		n, _ := strconv.Atoi(d.Get("action"))
		p.Action = mesh.PolicyAction(n)
	}
	for _, l := range d.Lines() {
		switch l.Command {
		case "rule":
			p.Groups = append(p.Groups, mesh.Group{})
		case "clause":
			g := &p.Groups[len(p.Groups)-1]
			g.Clauses = append(g.Clauses, mesh.Clause{})
		case "match":
			g := &p.Groups[len(p.Groups)-1]
			c := &g.Clauses[len(g.Clauses)-1]
			c.Matches = append(c.Matches, readMatch(l))
		default:
			l.Fatalf("not a part of a policy")
		}
	}
	return p
}

func readMatch(d *meshtest.Directive) mesh.Match {
	m := mesh.Match{
		Namespaces: readStrings(d.List("namespaces")), NotNamespaces: readStrings(d.List("not-namespaces")),
		Principals: readStrings(d.List("principals")), NotPrincipals: readStrings(d.List("not-principals")),
		ServiceAccounts: readAccounts(d.List("accounts")), NotServiceAccounts: readAccounts(d.List("not-accounts")),
		SourceIPs: readPrefixes(d, "sources"), NotSourceIPs: readPrefixes(d, "not-sources"),
		DestinationIPs: readPrefixes(d, "dests"), NotDestinationIPs: readPrefixes(d, "not-dests"),
		DestinationPorts: readPorts(d, "ports"), NotDestPorts: readPorts(d, "not-ports"),
	}
	o := &mesh.Operation{
		Methods: readStrings(d.List("methods")), NotMethods: readStrings(d.List("not-methods")),
		Paths: readStrings(d.List("paths")), NotPaths: readStrings(d.List("not-paths")),
		Hosts: readStrings(d.List("hosts")), NotHosts: readStrings(d.List("not-hosts")),
	}
	values, notValues := readStrings(d.List("header.x-name")), readStrings(d.List("not-header.x-name"))
	if len(values)+len(notValues) > 0 {
		o.Headers = []mesh.HeaderCondition{{Name: "x-name", Values: values, NotValues: notValues}}
	}
	if !o.IsZero() {
		m.Operation = o
	}
	return m
}

func readStrings(vs []string) []mesh.StringMatch {
	var ms []mesh.StringMatch
	for _, v := range vs {
		switch {
		case v == "?":
			ms = append(ms, mesh.StringMatch{Kind: 77})
		case v == "*":
			ms = append(ms, mesh.StringMatch{Kind: mesh.MatchPresence})
		case strings.HasPrefix(v, "template:"):
			ms = append(ms, mesh.StringMatch{Kind: mesh.MatchTemplate, Value: v[len("template:"):]})
		case strings.HasSuffix(v, "*"):
			ms = append(ms, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: strings.TrimSuffix(v, "*")})
		case strings.HasPrefix(v, "*"):
			ms = append(ms, mesh.StringMatch{Kind: mesh.MatchSuffix, Value: strings.TrimPrefix(v, "*")})
		default:
			ms = append(ms, mesh.StringMatch{Kind: mesh.MatchExact, Value: v})
		}
	}
	return ms
}

func readAccounts(vs []string) []mesh.ServiceAccount {
	var as []mesh.ServiceAccount
	for _, v := range vs {
		ns, name, _ := strings.Cut(v, "/")
		as = append(as, mesh.ServiceAccount{Namespace: ns, Name: name})
	}
	return as
}

func readPrefixes(d *meshtest.Directive, key string) []netip.Prefix {
	var ps []netip.Prefix
	for _, v := range d.List(key) {
		if v == "?" {
			ps = append(ps, netip.Prefix{})
			continue
		}
		p, err := netip.ParsePrefix(v)
		if err != nil {
			d.Fatalf("%v", err)
		}
		ps = append(ps, p)
	}
	return ps
}

func readPorts(d *meshtest.Directive, key string) []uint16 {
	var ps []uint16
	for _, v := range d.List(key) {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			d.Fatalf("%v", err)
		}
		ps = append(ps, uint16(n))
	}
	return ps
}
