package suite_test

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

const system = "istio-system"

// TestUpgrade: every program of the mesh is replaced, and replaced again by the one there was, under load on both nodes.
// No short connection fails; a long one lives until the ztunnel that carries it must go.
func TestUpgrade(t *testing.T) {
	s := newSpace(t, "e2e-upgrade", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server-one", node: one}, workload{name: "server-two", node: two})
	s.redirected(true)
	address := func(pod, port string) string { return net.JoinHostPort(s.pod(pod).Status.PodIP, port) }
	var loads, holds []workload
	for _, end := range []struct {
		node         *lab.Node
		from, server string
	}{{one, "one", "server-two"}, {two, "two", "server-one"}} {
		loads = append(loads,
			workload{name: "service-" + end.from, node: end.node, args: []string{"load", "http://" + end.server + "/", "50"}},
			workload{name: "podip-" + end.from, node: end.node, args: []string{"load", "http://" + address(end.server, "8080") + "/", "50"}})
		holds = append(holds,
			workload{name: "holder-" + end.from, node: end.node, args: []string{"hold", address(end.server, "9000"), "50ms"}})
	}
	s.deploy(append(loads, holds...)...)
	before := s.tag()
	next := before + "-again"
	retag(s, before, next)
	ctl := buildMistctl(s)

	for _, step := range []struct{ name, tag string }{{"upgrade", next}, {"rollback", before}} {
		t.Run(step.name, func(t *testing.T) {
			s := &space{t, s.name}
			for _, w := range loads {
				s.load(w.name)
			}
			for _, w := range holds {
				s.ticks(w.name)
			}
			old := s.meshPods()
			drains := s.watchDrains()
			started := time.Now()
			out, err := cluster.Command(t.Context(), ctl, "upgrade", "--timeout", "5m", "--set", "global.tag="+step.tag).CombinedOutput()
			if err != nil {
				t.Fatalf("mistctl upgrade: %v\n%s", err, out)
			}
			t.Logf("mistctl upgrade took %v", time.Since(started).Round(time.Second))
			s.eventually("every old program is gone", func() error {
				for name := range s.meshPods() {
					if old[name] {
						return fmt.Errorf("%s is still there", name)
					}
				}
				return nil
			})
			for _, w := range loads {
				sent, failed := s.load(w.name)
				if failed > 0 {
					logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", w.name)
					t.Errorf("%s: %d of %d connections failed\n%s", w.name, failed, sent, complaints(logs))
				}
			}
			drain := drains()
			t.Logf("old ztunnels were told to end at %s and had %v", drain.first.Format(time.TimeOnly), drain.grace)
			for _, w := range holds {
				s.livedThrough(w.name, drain)
			}
		})
	}
}

// drain is when the first ztunnel was told to end, and the time it then had.
type drain struct {
	first time.Time
	grace time.Duration
}

// watchDrains notes when ztunnels are told to end, until the returned function is called.
func (s *space) watchDrains() func() drain {
	ctx, stop := context.WithCancel(s.Context())
	found := make(chan drain, 1)
	go func() {
		var d drain
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			pods, err := cluster.Client().CoreV1().Pods(system).List(ctx, metav1.ListOptions{LabelSelector: "app=ztunnel"})
			if err == nil {
				for _, p := range pods.Items {
					if p.DeletionTimestamp == nil || p.DeletionGracePeriodSeconds == nil {
						continue
					}
					grace := time.Duration(*p.DeletionGracePeriodSeconds) * time.Second
					if began := p.DeletionTimestamp.Add(-grace); grace > 0 && (d.first.IsZero() || began.Before(d.first)) {
						d = drain{began, grace}
					}
				}
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				found <- d
				return
			}
		}
	}()
	return func() drain { stop(); return <-found }
}

// livedThrough fails when a connection that is held ended before the first ztunnel had had its time; ztunnel keeps the last
// five seconds of it for itself. Times in the API are whole seconds.
func (s *space) livedThrough(pod string, d drain) {
	s.Helper()
	if d.first.IsZero() {
		s.Fatal("no ztunnel was seen to end")
	}
	for _, cs := range s.pod(pod).Status.ContainerStatuses {
		last := cs.State.Terminated // unless it runs again
		if last == nil {
			last = cs.LastTerminationState.Terminated
		}
		if last == nil || last.FinishedAt.Time.Before(d.first) {
			s.Logf("%s was not cut", pod)
			continue
		}
		lived := last.FinishedAt.Sub(d.first)
		s.Logf("%s was cut %v after the drain began", pod, lived)
		if least := d.grace - 7*time.Second; lived < least {
			s.Errorf("%s lived only %v after the first ztunnel was told to end, want %v: %s", pod, lived, least, last.Message)
		}
	}
}

// meshPods are the names of the pods of the mesh's programs.
func (s *space) meshPods() map[string]bool {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods(system).List(s.Context(), metav1.ListOptions{})
	s.must(err)
	names := map[string]bool{}
	for _, p := range pods.Items {
		if p.Status.Phase == corev1.PodRunning {
			names[p.Name] = true
		}
	}
	return names
}

// tag is that of the images of the mesh that is installed.
func (s *space) tag() string {
	s.Helper()
	ds, err := cluster.Client().AppsV1().DaemonSets(system).Get(s.Context(), "ztunnel", metav1.GetOptions{})
	s.must(err)
	image := ds.Spec.Template.Spec.Containers[0].Image
	return image[strings.LastIndex(image, ":")+1:]
}

// retag gives the mesh's images a second tag on every node.
func retag(s *space, from, to string) {
	s.Helper()
	for _, n := range cluster.Nodes {
		for _, image := range []string{"istiod", "cni", "ztunnel", "waypoint"} {
			name := "localhost/mistnet/" + image + ":"
			_, err := n.Exec(s.Context(), "ctr", "-n", "k8s.io", "images", "tag", "--force", name+from, name+to)
			s.must(err)
		}
	}
}

// buildMistctl returns this tree's mistctl.
func buildMistctl(s *space) string {
	s.Helper()
	bin := filepath.Join(s.TempDir(), "mistctl")
	cmd := exec.CommandContext(s.Context(), "nice", "-n", "19", "go", "build", "-buildvcs=false", "-o", bin, "./cmd/mistctl")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("build mistctl: %v\n%s", err, out)
	}
	return bin
}

// TestZtunnelPrivileges looks at what the kernel lets the running ztunnels do.
func TestZtunnelPrivileges(t *testing.T) {
	if cluster == nil {
		t.Skip("runs in a Kubernetes cluster: set MISTNET_E2E=1, as root (make e2e does)")
	}
	const netAdmin, netRaw, sysAdmin = 1 << 12, 1 << 13, 1 << 21
	capabilities := fmt.Sprintf("%016x", netAdmin|netRaw|sysAdmin)
	for _, n := range cluster.Nodes {
		out, err := n.Exec(t.Context(), "sh", "-c", `for p in $(pgrep -x ztunnel); do
			grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|Seccomp):' /proc/$p/status
			[ $(readlink /proc/$p/ns/net) = $(readlink /proc/1/ns/net) ] && echo host network
			[ $(readlink /proc/$p/ns/pid) = $(readlink /proc/1/ns/pid) ] && echo host processes
			awk '$2 == "/" { split($4, o, ","); print "root is " o[1] }' /proc/$p/mounts
		done`)
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Join(strings.Fields(out), " ")
		want := fmt.Sprintf("CapInh: %016x CapPrm: %[2]s CapEff: %[2]s CapBnd: %[2]s CapAmb: %016[1]x Seccomp: 2 root is ro", 0, capabilities)
		if got != want {
			t.Errorf("%s: ztunnel has\n%s\nwant\n%s", n.Name, got, want)
		}
	}
}
