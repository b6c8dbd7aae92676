package control_test

import (
	"bufio"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/bench/control"
	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint/route"
)

var places = control.Places{
	Client:    netip.MustParseAddr("10.201.1.2"),
	Server:    netip.MustParseAddrPort("10.201.2.2:7000"),
	Waypoints: map[string]netip.Addr{control.Plain: netip.MustParseAddr("10.201.0.1"), control.Guarded: netip.MustParseAddr("10.201.0.3")},
}

func of(t *testing.T, typeURL string) []xds.Resource {
	t.Helper()
	changes, err := control.Changes(places)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range changes {
		if c.TypeURL == typeURL {
			return c.Upserts
		}
	}
	t.Fatalf("nothing is published of %s", typeURL)
	return nil
}

// TestTheLastRuleIsAskedFor: what clients ask of a service reaches its last rule, and no rule has a problem.
func TestTheLastRuleIsAskedFor(t *testing.T) {
	var rules []*mesh.Route
	for _, r := range of(t, mesh.TypeRoute) {
		m, err := wds.DecodeRoute(r.Body)
		if err != nil {
			t.Fatalf("%s: %v", r.Name, err)
		}
		rules = append(rules, m)
	}
	table, problems := route.Compile(rules)
	if len(problems) > 0 {
		t.Errorf("problems: %v", problems)
	}
	for _, s := range []control.Service{control.One, control.Thousand, control.Two, control.Checked} {
		path, _, _ := strings.Cut(s.Path(), "?")
		key := mesh.ServiceKey(control.Namespace, s.Name+"."+control.Namespace+".svc.cluster.local")
		rule, _ := table.Match(key, s.VIP.Port(), &route.Request{Method: "GET", Path: path, Authority: "x", Port: s.VIP.Port()})
		if rule == nil || int(rule.Route.Rule) != s.Rules-1 {
			t.Errorf("%s of %s reaches %+v, want rule %d", path, s.Name, rule, s.Rules-1)
		}
	}
}

// TestOnlyTheLastPolicyAllows: without it, the request that clients make is denied.
func TestOnlyTheLastPolicyAllows(t *testing.T) {
	var guards []*mesh.Policy
	for _, r := range of(t, mesh.TypeAuthorization) {
		p, err := wds.DecodePolicy(r.Body)
		if err != nil {
			t.Fatalf("%s: %v", r.Name, err)
		}
		if strings.HasPrefix(p.Name, control.Guarded) {
			guards = append(guards, p)
		}
	}
	if len(guards) != control.Policies {
		t.Fatalf("%d policies, want %d", len(guards), control.Policies)
	}
	request := &authz.Request{Peer: control.Identity("client"), HTTP: &authz.HTTP{Method: "GET", Host: "x", Path: "/items"}}
	for last, want := range map[bool]bool{true: true, false: false} {
		ps := guards
		if !last {
			ps = ps[:len(ps)-1]
		}
		set, err := authz.Compile(ps)
		if err != nil {
			t.Fatal(err)
		}
		if got := set.Check(request); got.Allow != want {
			t.Errorf("with the last policy %v: %+v, want allow %v", last, got, want)
		}
	}
}

func TestItServesUntilItsInputEnds(t *testing.T) {
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- control.Main(t.Context(), []string{
			"-dir", t.TempDir(), "-listen", "127.0.0.1:0", "-client", "10.0.0.1", "-plain", "10.0.0.2", "-guarded", "10.0.0.3", "-server", "10.0.0.4:80",
		}, inR, outW)
	}()
	if line, err := bufio.NewReader(outR).ReadString('\n'); err != nil || strings.TrimSpace(line) != control.Ready {
		t.Fatalf("it said %q, %v", line, err)
	}
	inW.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := control.Main(t.Context(), []string{"-client", "nobody"}, strings.NewReader(""), io.Discard); err == nil {
		t.Error("addresses that are none: no error")
	}
}
