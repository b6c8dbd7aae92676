package cni_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/plugin"
)

// modes are the values of Config.NFTables.
var modes = map[string]string{"iptables": "false", "nftables": "true"}

// manyPods writes a namespace of the mesh with pods web-0 to web-N.
func (n *node) manyPods(count int) {
	var b strings.Builder
	b.WriteString(namespace("shop", "ambient"))
	for i := range count {
		b.WriteString(podYAML("shop", fmt.Sprintf("web-%d", i), fmt.Sprintf("u-%d", i), ""))
	}
	n.write("shop.yaml", b.String())
}

// A pod's start waits for every program the agent runs.
func TestAddStartsNoProgram(t *testing.T) {
	t.Parallel()
	for mode, native := range modes {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			log := filepath.Join(n.root, "started")
			for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore", "nft"} {
				real, err := exec.LookPath(name)
				if err != nil {
					t.Fatal(err)
				}
				script := fmt.Sprintf("#!/bin/sh\necho %s >> %s\nexec %s \"$@\"\n", name, log, real)
				if err := os.WriteFile(filepath.Join(n.root, name), []byte(script), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			n.config = func(c *cni.Config) {
				c.NFTables, c.IPTables, c.NFT = native, filepath.Join(n.root, "iptables"), filepath.Join(n.root, "nft")
			}
			n.manyPods(1)
			n.start()
			z, _ := n.ztunnel()
			z.expect("synced []")
			s := newSandbox(t)
			if err := os.Remove(log); err != nil {
				t.Fatalf("the agent did not run programs through the test's: %v", err)
			}
			n.add(s.event("shop", "web-0", "u-0", "c-0"))
			n.redirection("shop/web-0", "enabled")
			if b, err := os.ReadFile(log); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("ADD ran %q, want none (%v)", b, err)
			}
		})
	}
}

// BenchmarkAdd is what the runtime waits for besides its own work: the agent's part of ADD, with a ztunnel that answers at
// once. Its percentiles are those in docs/benchmarks.md, on a machine that does nothing else; the processors' time, of the
// agent and the programs it runs, depends less on what others do.
func BenchmarkAdd(b *testing.B) {
	for mode, native := range modes {
		b.Run(mode, func(b *testing.B) {
			n := newNode(b)
			n.config = func(c *cni.Config) { c.NFTables = native }
			const pods = 300
			n.manyPods(pods)
			n.start()
			z, _ := n.ztunnel()
			z.expect("synced []")
			var took []time.Duration
			var worked time.Duration
			for i := 0; b.Loop(); i++ {
				s := newSandbox(b)
				ev := s.event("shop", fmt.Sprintf("web-%d", i%pods), fmt.Sprintf("u-%d", i%pods), fmt.Sprintf("c-%d", i))
				b.StartTimer()
				began, before := time.Now(), processors(b)
				if code, text := n.ask(http.MethodPost, plugin.PathAdd, ev); code != http.StatusOK {
					b.Fatal(code, text)
				}
				took = append(took, time.Since(began))
				worked += processors(b) - before
				b.StopTimer()
				n.ask(http.MethodPost, plugin.PathDel, ev)
				s.destroy()
				for len(z.events) > 0 {
					<-z.events
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(worked.Microseconds())/1000/float64(len(took)), "cpu-ms")
			slices.Sort(took)
			for name, p := range map[string]int{"p50-ms": 50, "p90-ms": 90, "p99-ms": 99} {
				b.ReportMetric(float64(took[(len(took)-1)*p/100].Microseconds())/1000, name)
			}
		})
	}
}

// processors is the time they have worked for this process and the programs it has waited for.
func processors(b *testing.B) time.Duration {
	b.Helper()
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}
