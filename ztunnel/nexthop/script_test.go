package nexthop_test

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// The language of the scripts is meshtest.World's, and:
//
//	outbound from=<namespace>/<pod> dst=<addr:port> [pick=<n>,…] [resolved=<addr>]
//	inbound to=<namespace>/<pod> local=<addr:port> authority=<authority>
//	passthrough to=<namespace>/<pod> dst=<addr:port>
//
// pick gives the random numbers drawn, modulo their bound, one after the other; 0 when it runs out.
func TestScripts(t *testing.T) {
	meshtest.RunScripts(t, "testdata/*.txt", func(*testing.T) func(*meshtest.Directive) string {
		w := meshtest.NewWorld()
		return func(d *meshtest.Directive) string {
			if w.Run(d) {
				return ""
			}
			switch d.Command {
			case "outbound":
				hop, err := nexthop.Outbound(w.Snapshot, pod(w, d, "from"), d.AddrPort("dst"), picks(d))
				if d.Has("resolved") {
					hop = hop.Resolved(d.AddrPort("resolved").Addr())
				}
				return say(hop, err)
			case "inbound":
				hop, err := nexthop.Inbound(w.Snapshot, pod(w, d, "to"), d.AddrPort("local"), d.Get("authority"))
				return say(hop, err)
			case "passthrough":
				return say(nexthop.Passthrough(pod(w, d, "to"), d.AddrPort("dst")))
			}
			d.Fatalf("no such directive")
			return ""
		}
	})
}

// pod is nil when the script says nobody.
func pod(w *meshtest.World, d *meshtest.Directive, key string) *mesh.Workload {
	name := d.Get(key)
	if name == "nobody" {
		return nil
	}
	return w.Pod(d, name)
}

func picks(d *meshtest.Directive) func(uint64) uint64 {
	given := d.List("pick")
	return func(n uint64) uint64 {
		if len(given) == 0 {
			return 0
		}
		v, err := strconv.ParseUint(given[0], 10, 64)
		if err != nil {
			d.Fatalf("pick: %v", err)
		}
		given = given[1:]
		return v % n
	}
}

func say(hop nexthop.Hop, err error) string {
	var b strings.Builder
	line := func(name string, v any) { fmt.Fprintf(&b, "%s: %v\n", name, v) }
	if err != nil {
		e, ok := errors.AsType[*nexthop.Error](err)
		if !ok {
			return "not a *nexthop.Error: " + err.Error()
		}
		line("error", e)
		line("status", e.Status())
		if e.Missing != "" {
			line("missing", e.Missing)
		}
		if hop.Protocol != nexthop.ProtocolUnknown || hop.Addr.IsValid() {
			line("hop beside the error", hop)
		}
		if hop.Workload != nil {
			line("workload", hop.Workload.Namespace+"/"+hop.Workload.Name)
		}
		if hop.Service != nil {
			line("service", hop.Service.Key())
		}
		return b.String()
	}
	line("hop", fmt.Sprintf("%v %v", hop.Protocol, hop.Addr))
	line("why", hop.Why)
	for _, f := range []struct{ name, value string }{
		{"resolve", hop.Resolve}, {"authority", hop.Authority}, {"missing", hop.Missing},
	} {
		if f.value != "" {
			line(f.name, f.value)
		}
	}
	for _, id := range hop.Expect {
		line("expect", id.Principal())
	}
	for _, id := range hop.InnerExpect {
		line("expect inside", id.Principal())
	}
	if hop.Workload != nil {
		line("workload", hop.Workload.Namespace+"/"+hop.Workload.Name)
	}
	if hop.Service != nil {
		line("service", hop.Service.Key())
		if hop.ForwardedHost != hop.Service.Hostname {
			line("forwarded host", hop.ForwardedHost)
		}
	}
	if hop.AppTunnel != (mesh.AppTunnel{}) {
		line("tunnel", fmt.Sprintf("%+v to %v", hop.AppTunnel, hop.Target))
	}
	return b.String()
}
