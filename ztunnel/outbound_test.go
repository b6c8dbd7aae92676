package ztunnel

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// One replica of a waypoint is gone, the other serves: whoever is sent to the first goes on to the second. What is no waypoint, and
// what is there but fails, is tried once.
func TestAnotherWaypointIsTried(t *testing.T) {
	t.Parallel()
	a, b := netip.MustParseAddrPort("10.0.0.1:15008"), netip.MustParseAddrPort("10.0.0.2:15008")
	refused := error(&hbone.StageError{Stage: hbone.StageDial, Err: unix.ECONNREFUSED})
	for _, tt := range []struct {
		name  string
		why   nexthop.Reason
		picks []netip.AddrPort // the last for ever
		fails map[netip.AddrPort]error
		want  []netip.AddrPort // dialled
		err   error
	}{
		{"the first serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, nil, []netip.AddrPort{a}, nil},
		{"the other serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, a, a, b}, map[netip.AddrPort]error{a: refused}, []netip.AddrPort{a, b}, nil},
		{"of a workload", nexthop.ThroughWorkloadWaypoint, []netip.AddrPort{b, a}, map[netip.AddrPort]error{b: unix.EHOSTUNREACH}, []netip.AddrPort{b, a}, nil},
		{"there is no other", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a}, map[netip.AddrPort]error{a: refused}, []netip.AddrPort{a}, refused},
		{"nobody serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b, a}, map[netip.AddrPort]error{a: refused, b: refused}, []netip.AddrPort{a, b}, refused},
		{"it does not answer", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, map[netip.AddrPort]error{a: unix.ETIMEDOUT}, []netip.AddrPort{a}, unix.ETIMEDOUT},
		{"it is no waypoint", nexthop.DirectToEndpoint, []netip.AddrPort{a, b}, map[netip.AddrPort]error{a: refused}, []netip.AddrPort{a}, refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			picks := tt.picks
			var dialled []netip.AddrPort
			_, err := reach(func() (nexthop.Hop, error) {
				hop := nexthop.Hop{Why: tt.why, Addr: picks[0]}
				if len(picks) > 1 {
					picks = picks[1:]
				}
				return hop, nil
			}, func(hop nexthop.Hop) (relay.Conn, error) {
				dialled = append(dialled, hop.Addr)
				return nil, tt.fails[hop.Addr]
			})
			if !errors.Is(err, tt.err) {
				t.Errorf("reach = %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, dialled, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("dialled (-want +got):\n%s", diff)
			}
		})
	}
}
