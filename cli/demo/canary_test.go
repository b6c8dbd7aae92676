package demo

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/netlab"
)

// TestCanaryWaypoint: a service that has two waypoints sends each its share of connections, by our ztunnel and by one of the
// Istio project; the share can be changed, and all of it be given to the new one.
func TestCanaryWaypoint(t *testing.T) {
	w := newTestWorld(t)
	text, err := own.ReadFile("manifests/waypoint.yaml")
	must(t, "read the waypoint's manifest", err)
	must(t, "write that of a second one", w.writeText("next.yaml", strings.NewReplacer(
		"name: waypoint", "name: next", "waypoint-uid", "next-uid", "gateway-name: waypoint", "gateway-name: next",
		"serviceAccountName: waypoint", "serviceAccountName: next", "10.96.0.30", "10.96.0.31").Replace(string(text))))
	p, err := w.lab.AddPod(t.Context(), w.node("node2"), netlab.PodSpec{Namespace: "shop", Name: "next", UID: "next-uid"})
	must(t, "start its pod", err)
	w.pods["shop/next"] = &pod{Pod: p, ip: p.IPs[0], ip6: p.IPs[1]}
	must(t, "start it", w.startWaypoint(t.Context(), p, "node2"))
	t.Cleanup(func() { must(t, "stop it", w.procs["next"].Stop(10*time.Second)) })

	t.Run("ours", w.splits)
	t.Run("stock", func(t *testing.T) {
		w.replaceZtunnel(t, stockZtunnel(t), "node1", "node2")
		w.splits(t)
	})
}

// splits gives the second waypoint several shares of connections, one after the other, and counts at both.
func (w *world) splits(t *testing.T) {
	const asked = 200
	attempt := 0
	for _, share := range []struct {
		weight    string
		low, high int // of those that the second one gets
	}{{"30", asked * 15 / 100, asked * 45 / 100}, {"100", asked, asked}, {"0", 0, 0}} {
		must(t, "give the canary its share", w.write("api.yaml", func(s string) string {
			return strings.Replace(s, "    istio.io/use-waypoint: waypoint\n", "    istio.io/use-waypoint: waypoint\n    istio.io/use-waypoint-canary: next\n"+
				"  annotations: {istio.io/use-waypoint-canary-weight: \""+share.weight+"\"}\n", 1)
		}))
		soon(t, "the second waypoint gets "+share.weight+" % of connections", func() error {
			// Each on a connection of its own. Lines come to the logs when they come: no two attempts ask for the same.
			attempt++
			path := fmt.Sprintf("/split-%s-%d", t.Name()[strings.LastIndexByte(t.Name(), '/')+1:], attempt)
			tally, err := w.ask(t.Context(), path, asked, 2, "connection: close")
			if err != nil {
				return err
			}
			if tally.count[v1]+tally.count[v2] != asked {
				return fmt.Errorf("some failed: %v", tally.count)
			}
			var old, next int
			if _, err := eventually(t.Context(), 5*time.Second, func() error {
				if old, next = w.served("waypoint", path), w.served("next", path); old+next != asked {
					return fmt.Errorf("%d of %d requests are in the logs", old+next, asked)
				}
				return nil
			}); err != nil {
				return err
			}
			if next < share.low || next > share.high {
				err = fmt.Errorf("%d requests at the first, %d at the second", old, next)
			}
			return err
		})
	}
}

// served is how many requests for a path a waypoint has in its log.
func (w *world) served(name, path string) int {
	b, err := os.ReadFile(w.procs[name].log)
	if err != nil {
		return -1
	}
	return strings.Count(string(b), "GET "+path+" HTTP/1.1")
}
