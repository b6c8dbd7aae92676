package suite_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mistnet/mistnet/e2e/lab"
)

const (
	modeLabel   = "istio.io/dataplane-mode"
	redirection = "ambient.istio.io/redirection"
	patience    = 2 * time.Minute // for what a cluster does in its own time, on a busy machine
)

// space is a namespace of one test, with pods in it.
type space struct {
	*testing.T
	name string
}

// newSpace makes a namespace, in the mesh when it says so, that goes when the test ends.
func newSpace(t *testing.T, name string, meshed bool) *space {
	t.Helper()
	if cluster == nil {
		t.Skip("runs in a Kubernetes cluster: set MISTNET_E2E=1, as root (make e2e does)")
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	if meshed {
		ns.Labels[modeLabel] = "ambient"
	}
	namespaces := cluster.Client().CoreV1().Namespaces()
	s := &space{t, name}
	// One of an earlier run may still be going.
	s.eventually("make namespace "+name, func() error {
		_, err := namespaces.Create(t.Context(), ns, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			_ = namespaces.Delete(t.Context(), name, metav1.DeleteOptions{})
		}
		return err
	})
	t.Cleanup(func() { // the test's context has ended by now
		if os.Getenv("MISTNET_E2E_KEEP") == "" {
			_ = namespaces.Delete(context.Background(), name, metav1.DeleteOptions{})
		}
	})
	return s
}

// workload is a pod with a service account and a service of its name.
type workload struct {
	name string
	node *lab.Node
	args []string // of e2e/app; none: serve
	init []string // of an init container; none: there is none
	more string   // fields of the container besides, YAML in braces' style: "readinessProbe: {...}"
}

func (s *space) deploy(ws ...workload) {
	s.Helper()
	var b strings.Builder
	for _, w := range ws {
		args := w.args
		if len(args) == 0 {
			args = []string{"serve"}
		}
		init := ""
		if len(w.init) > 0 {
			init = fmt.Sprintf("\n  initContainers: [{name: init, image: %q, args: %s}]", lab.AppImage, quoted(w.init))
		}
		more := ""
		if w.more != "" {
			more = ", " + w.more
		}
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: ServiceAccount
metadata: {name: %[1]s, namespace: %[2]s}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec: {selector: {app: %[1]s}, ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-echo, port: 9000}]}
---
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: %[2]s, labels: {app: %[1]s}}
spec:
  serviceAccountName: %[1]s
  nodeName: %[3]s
  terminationGracePeriodSeconds: 1%[4]s
  containers: [{name: app, image: %[5]q, args: %[6]s, env: [{name: NODE, value: %[3]s}]%[7]s}]
`, w.name, s.name, w.node.Name, init, lab.AppImage, quoted(args), more)
	}
	s.must(cluster.Apply(s.Context(), b.String()))
	for _, w := range ws {
		s.ready(w.name)
	}
}

// ready waits for a pod.
func (s *space) ready(name string) {
	s.Helper()
	s.eventually(name+" is ready", func() error {
		pod, err := cluster.Client().CoreV1().Pods(s.name).Get(s.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("status: %s, %+v %+v", pod.Status.Phase, pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses)
	})
}

func quoted(words []string) string {
	q := make([]string, len(words))
	for i, w := range words {
		q[i] = strconv.Quote(w)
	}
	return "[" + strings.Join(q, ", ") + "]"
}

// label puts the namespace in the mesh, or takes it out.
func (s *space) label(meshed bool) {
	s.Helper()
	value := "null"
	if meshed {
		value = `"ambient"`
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%s}}}`, modeLabel, value)
	_, err := cluster.Client().CoreV1().Namespaces().Patch(s.Context(), s.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	s.must(err)
}

// redirected waits until the agent says of every pod of the namespace that it is in the mesh, or of none.
func (s *space) redirected(want bool) {
	s.Helper()
	s.eventually(fmt.Sprintf("pods are redirected: %t", want), func() error {
		for _, p := range s.pods() {
			if p.Labels[modeLabel] == "none" {
				continue // a waypoint
			}
			if got := p.Annotations[redirection]; (got == "enabled") != want {
				return fmt.Errorf("%s has %s=%q", p.Name, redirection, got)
			}
		}
		return nil
	})
}

func (s *space) pods() []corev1.Pod {
	s.Helper()
	pods, err := cluster.Client().CoreV1().Pods(s.name).List(s.Context(), metav1.ListOptions{})
	s.must(err)
	return pods.Items
}

func (s *space) pod(name string) *corev1.Pod {
	s.Helper()
	pod, err := cluster.Client().CoreV1().Pods(s.name).Get(s.Context(), name, metav1.GetOptions{})
	s.must(err)
	return pod
}

// undisturbed fails when a container of the namespace was ever started again.
func (s *space) undisturbed() {
	s.Helper()
	for _, p := range s.pods() {
		for _, c := range p.Status.ContainerStatuses {
			if c.RestartCount > 0 {
				logs, _ := cluster.Kubectl(s.Context(), "-n", s.name, "logs", p.Name, "-c", c.Name, "--previous", "--timestamps", "--tail=3")
				s.Errorf("%s was started %d times again; before that it said\n%s", p.Name, c.RestartCount, logs)
			}
		}
	}
}

// run runs e2e/app in a pod.
func (s *space) run(pod string, args ...string) (string, error) {
	return cluster.Kubectl(s.Context(), append([]string{"-n", s.name, "exec", pod, "-c", "app", "--", "/app"}, args...)...)
}

// get asks once, and fails the test when there is no answer.
func (s *space) get(pod, url string) string {
	s.Helper()
	out, err := s.run(pod, "get", url)
	s.must(err)
	return out
}

// reach asks until there is an answer: that a pod is ready comes about in its own time wherever it must be known.
func (s *space) reach(pod, url string) {
	s.Helper()
	s.eventually(pod+" reaches "+url, func() error { _, err := s.run(pod, "get", url); return err })
}

var totals = regexp.MustCompile(`sent (\d+) failed (\d+)\n`)

// load returns the totals of a pod that runs "load", newer than the call.
func (s *space) load(pod string) (sent, failed int) {
	s.Helper()
	first := -1
	s.eventually(pod+" goes on", func() error {
		logs, err := cluster.Kubectl(s.Context(), "-n", s.name, "logs", pod, "-c", "app")
		if err != nil {
			return err
		}
		all := totals.FindAllStringSubmatch(logs, -1)
		if len(all) == 0 {
			return errors.New("no totals yet")
		}
		last := all[len(all)-1]
		sent, _ = strconv.Atoi(last[1])
		failed, _ = strconv.Atoi(last[2])
		if first < 0 {
			first = sent
		}
		if sent == first {
			return errors.New("nothing was sent since")
		}
		return nil
	})
	return sent, failed
}

// ticks returns how far a pod that runs "hold" has come, newer than the call.
func (s *space) ticks(pod string) int {
	s.Helper()
	first, n := -1, 0
	s.eventually(pod+"'s connection goes on", func() error {
		logs, err := cluster.Kubectl(s.Context(), "-n", s.name, "logs", pod, "-c", "app", "--tail=1")
		if err != nil {
			return err
		}
		if _, err := fmt.Sscanf(logs, "tick %d", &n); err != nil {
			return fmt.Errorf("last line %q: %w", logs, err)
		}
		if first < 0 {
			first = n
		}
		if n == first {
			return errors.New("no tick since")
		}
		return nil
	})
	return n
}

// eventually polls, for what a cluster does takes its time.
func (s *space) eventually(what string, fn func() error) {
	s.Helper()
	deadline, tick := time.After(patience), time.NewTicker(100*time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			s.Fatalf("%s: %v", what, err)
		case <-s.Context().Done():
			s.Fatal(s.Context().Err())
		case <-tick.C:
		}
	}
}

func (s *space) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// logged is nil when a line of the log of a node's ztunnel has all the words.
func (s *space) logged(n *lab.Node, words ...string) error {
	s.Helper()
	logs, err := cluster.Kubectl(s.Context(), "-n", system, "logs", "--tail=3000", ztunnelOn(s, n.Name))
	if err != nil {
		return err
	}
	similar := ""
lines:
	for line := range strings.Lines(logs) {
		for i, word := range words {
			if !strings.Contains(line, word) {
				if i > 1 {
					similar += line
				}
				continue lines
			}
		}
		return nil
	}
	return errors.New("no line with all of " + strings.Join(words, ", ") + "; with some of them\n" + similar)
}
