package ztunnel

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// One replica of a waypoint is gone, the other serves: whoever is sent to the first goes on to the second. What is no waypoint, and
// what is there but refuses, is tried once.
func TestAnotherWaypointIsTried(t *testing.T) {
	t.Parallel()
	a, b := netip.MustParseAddrPort("10.0.0.1:15008"), netip.MustParseAddrPort("10.0.0.2:15008")
	at := func(stage hbone.Stage, err error) error { return &hbone.StageError{Stage: stage, Err: err} }
	refused, unreachable := at(hbone.StageDial, unix.ECONNREFUSED), at(hbone.StageDial, unix.EHOSTUNREACH)
	silent, stranger := at(hbone.StageDial, os.ErrDeadlineExceeded), at(hbone.StageTLS, errors.New("another identity"))
	status, ours := error(&hbone.StatusError{Status: 503}), at(hbone.StageTLS, identityError{errors.New("no certificate")})
	type fails = map[netip.AddrPort]error
	type dial struct {
		Addr netip.AddrPort
		Wait time.Duration
	}
	for _, tt := range []struct {
		name  string
		why   nexthop.Reason
		picks []netip.AddrPort // the last for ever
		fails fails
		want  []dial
		err   error
	}{
		{"the first serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, nil, []dial{{a, patience}}, nil},
		{"the other serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, a, a, b}, fails{a: refused}, []dial{{a, patience}, {b, patience}}, nil},
		{"of a workload", nexthop.ThroughWorkloadWaypoint, []netip.AddrPort{b, a}, fails{b: unreachable}, []dial{{b, patience}, {a, patience}}, nil},
		{"it does not answer", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, fails{a: silent}, []dial{{a, patience}, {b, patience}}, nil},
		{"somebody else has its address", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, fails{a: stranger}, []dial{{a, patience}, {b, patience}}, nil},
		{"there is no other", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a}, fails{a: refused}, []dial{{a, patience}}, refused},
		{"there is no other, and it is slow", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a}, fails{a: silent}, []dial{{a, patience}, {a, 0}}, silent},
		{"nobody serves", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b, a}, fails{a: refused, b: refused}, []dial{{a, patience}, {b, patience}}, refused},
		{"one is slow, one is gone", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, fails{a: silent, b: refused}, []dial{{a, patience}, {b, patience}, {a, 0}}, silent},
		{"it says no", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, fails{a: status}, []dial{{a, patience}}, status},
		{"we are nobody", nexthop.ThroughServiceWaypoint, []netip.AddrPort{a, b}, fails{a: ours}, []dial{{a, patience}}, ours},
		{"it is no waypoint", nexthop.DirectToEndpoint, []netip.AddrPort{a, b}, fails{a: refused}, []dial{{a, 0}}, refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			picks := tt.picks
			var dialled []dial
			_, err := new(absentees).reach(func() (nexthop.Hop, error) {
				hop := nexthop.Hop{Why: tt.why, Addr: picks[0]}
				if len(picks) > 1 {
					picks = picks[1:]
				}
				return hop, nil
			}, func(hop nexthop.Hop, wait time.Duration) (relay.Conn, error) {
				dialled = append(dialled, dial{hop.Addr, wait})
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

// TestAnAbsentWaypointIsLeftAlone: one connection finds out, and those behind it do not wait; until it is asked again.
func TestAnAbsentWaypointIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := netip.MustParseAddrPort("10.0.0.1:15008"), netip.MustParseAddrPort("10.0.0.2:15008")
		var absent absentees
		back := false
		connect := func(picks ...netip.AddrPort) (dialled []netip.AddrPort) {
			_, err := absent.reach(func() (nexthop.Hop, error) {
				hop := nexthop.Hop{Why: nexthop.ThroughServiceWaypoint, Addr: picks[0]}
				if len(picks) > 1 {
					picks = picks[1:]
				}
				return hop, nil
			}, func(hop nexthop.Hop, wait time.Duration) (relay.Conn, error) {
				if dialled = append(dialled, hop.Addr); hop.Addr == a && !back {
					time.Sleep(wait)
					return nil, &hbone.StageError{Stage: hbone.StageDial, Err: os.ErrDeadlineExceeded}
				}
				return nil, nil
			})
			if err != nil {
				t.Error(err)
			}
			return dialled
		}
		check := func(when string, want, got []netip.AddrPort) {
			t.Helper()
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("%s, dialled (-want +got):\n%s", when, diff)
			}
		}
		check("it is gone", []netip.AddrPort{a, b}, connect(a, b))
		check("that is known", []netip.AddrPort{b}, connect(a, a, b))
		time.Sleep(absence)
		check("it is asked again", []netip.AddrPort{a, b}, connect(a, b))
		back = true
		check("there is nobody else", []netip.AddrPort{a}, connect(a))
		check("so it is there", []netip.AddrPort{a}, connect(a, b))
	})
}
