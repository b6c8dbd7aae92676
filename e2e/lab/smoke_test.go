package lab_test

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

//go:embed testdata/smoke.yaml
var smokeYAML string

// smoke proves that a lab is a Kubernetes cluster, and that its faults are the ones they claim to be.
func smoke(t *testing.T, l *lab.Lab) {
	ctx := t.Context()
	if err := l.Apply(ctx, smokeYAML); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Kubectl(ctx, "-n", "smoke", "rollout", "status", "ds/app", "--timeout=120s"); err != nil {
		t.Fatal(err)
	}
	s := &smoker{l}
	steps := []struct {
		name string
		run  func(*testing.T)
	}{
		{"pods of two nodes talk and see each other's address", s.podToPod},
		{"a service's address reaches all of its pods, the caller's own too", s.clusterIP},
		{"DNS knows services by short and long name", s.dns},
		{"a node port and a host port answer callers from outside", s.fromOutside},
		{"kubectl logs, exec and port-forward work", s.kubectl},
		{"a capture on the fabric sees what pods of two nodes say", s.capture},
		{"an unready pod gets no traffic", s.readiness},
		{"a dead container is started again in its pod", s.liveness},
		{"pods outlive containerd, kubelet, kube-proxy and API server", s.components},
		{"a node comes back from a power cut with the disk it had", s.powerCut},
	}
	for _, step := range steps {
		if !t.Run(step.name, step.run) {
			return // later steps build on it
		}
	}
}

type smoker struct{ l *lab.Lab }

// on returns the pod of a node that is running, by the kubelet's newest word.
func (s *smoker) on(t *testing.T, n *lab.Node) *corev1.Pod {
	t.Helper()
	pods, err := s.l.Client().CoreV1().Pods("smoke").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		t.Fatal(err)
	}
	if len(pods.Items) != 1 || pods.Items[0].Status.PodIP == "" {
		t.Fatalf("%s runs %d pods, want one with an address", n.Name, len(pods.Items))
	}
	return &pods.Items[0]
}

func (s *smoker) exec(t *testing.T, pod *corev1.Pod, args ...string) string {
	t.Helper()
	out, err := s.l.Kubectl(t.Context(), append([]string{"-n", "smoke", "exec", pod.Name, "--", "/app"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// http asks from the network the nodes are on.
func (s *smoker) http(ctx context.Context, method, host, port, path, body string) (string, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: s.l.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+net.JoinHostPort(host, port)+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return string(answer), err
}

// eventually polls: what a cluster does takes its time.
func eventually(t *testing.T, what string, fn func() error) {
	t.Helper()
	deadline, tick := time.After(2*time.Minute), time.NewTicker(200*time.Millisecond)
	defer tick.Stop()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%s: %v", what, err)
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-tick.C:
		}
	}
}

func (s *smoker) podToPod(t *testing.T) {
	a, b := s.on(t, s.l.Node(1)), s.on(t, s.l.Node(2))
	for i, ip := range b.Status.PodIPs {
		got := s.exec(t, a, "get", "http://"+net.JoinHostPort(ip.IP, "8080")+"/")
		if want := "node=node2 sees=" + a.Status.PodIPs[i].IP; !strings.Contains(got, want) {
			t.Errorf("%s from %s: got %q, want %q", ip.IP, a.Name, got, want)
		}
	}
	if want := map[bool]int{false: 1, true: 2}[s.l.DualStack()]; len(b.Status.PodIPs) != want {
		t.Errorf("pod has addresses %v, want %d", b.Status.PodIPs, want)
	}
}

func (s *smoker) clusterIP(t *testing.T) {
	svc, err := s.l.Client().CoreV1().Services("smoke").Get(t.Context(), "app", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, ip := range svc.Spec.ClusterIPs {
		got := s.exec(t, s.on(t, s.l.Node(1)), "get", "http://"+net.JoinHostPort(ip, "80")+"/", "40")
		if n := strings.Count(got, "200 "); n != 40 || !strings.Contains(got, "node=node1") || !strings.Contains(got, "node=node2") {
			t.Errorf("40 requests to %s: %d answered, want all, from both nodes:\n%s", ip, n, got)
		}
	}
}

func (s *smoker) dns(t *testing.T) {
	svc, err := s.l.Client().CoreV1().Services("smoke").Get(t.Context(), "app", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.l.Nodes {
		for _, name := range []string{"app", "app.smoke.svc.cluster.local."} {
			if got := s.exec(t, s.on(t, n), "resolve", name); !strings.Contains(got, svc.Spec.ClusterIP) {
				t.Errorf("%s on %s is %q, want %s", name, n.Name, got, svc.Spec.ClusterIP)
			}
		}
	}
}

func (s *smoker) fromOutside(t *testing.T) {
	for _, n := range s.l.Nodes {
		for _, port := range []string{"30080", "18080"} {
			if got, err := s.http(t.Context(), http.MethodGet, n.IP.String(), port, "/", ""); err != nil || !strings.Contains(got, "node=node") {
				t.Errorf("port %s of %s: %q, %v", port, n.Name, got, err)
			}
		}
	}
}

func (s *smoker) kubectl(t *testing.T) {
	pod := s.on(t, s.l.Node(2))
	if logs, err := s.l.Kubectl(t.Context(), "-n", "smoke", "logs", pod.Name); err != nil || !strings.Contains(logs, "serves HTTP") {
		t.Errorf("logs: %q, %v", logs, err)
	}
	forward := s.l.Command(t.Context(), "kubectl", "-n", "smoke", "port-forward", "pod/"+pod.Name, ":8080")
	stdout, err := forward.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = forward.Process.Kill(); _ = forward.Wait() }()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var port int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d ->", &port); err != nil {
		t.Fatalf("port-forward says %q: %v", line, err)
	}
	if got, err := s.http(t.Context(), http.MethodGet, "127.0.0.1", fmt.Sprint(port), "/", ""); err != nil || !strings.Contains(got, pod.Name) {
		t.Errorf("port-forward: %q, %v", got, err)
	}
}

func (s *smoker) capture(t *testing.T) {
	c, err := s.l.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a, b := s.on(t, s.l.Node(1)), s.on(t, s.l.Node(2))
	s.exec(t, a, "get", "http://"+net.JoinHostPort(b.Status.PodIP, "8080")+"/?captured-words")
	// What the control plane keeps is not on the wire between nodes.
	if err := s.l.Apply(t.Context(), "{apiVersion: v1, kind: ConfigMap, metadata: {name: words, namespace: smoke}, data: {words: stored-words}}"); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(); err != nil {
		t.Error(err)
	}
	if !c.Contains([]byte("captured-words")) {
		t.Errorf("%d frames, and not the request between nodes", c.Frames())
	}
	if c.Contains([]byte("stored-words")) {
		t.Error("the capture shows the control plane's own storage")
	}
}

func (s *smoker) readiness(t *testing.T) {
	a, b := s.on(t, s.l.Node(1)), s.on(t, s.l.Node(2))
	if _, err := s.http(t.Context(), http.MethodPost, b.Status.PodIP, "8080", "/readyz", "false"); err != nil {
		t.Fatal(err)
	}
	ready := func(want int) error {
		slices, err := s.l.Client().DiscoveryV1().EndpointSlices("smoke").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, slice := range slices.Items {
			n := 0
			for _, e := range slice.Endpoints {
				if e.Conditions.Ready != nil && *e.Conditions.Ready {
					n++
				}
			}
			if n != want {
				return fmt.Errorf("%s has %d ready endpoints, want %d", slice.Name, n, want)
			}
		}
		return nil
	}
	eventually(t, "readiness fails", func() error { return ready(len(s.l.Nodes) - 1) })
	eventually(t, "kube-proxy follows", func() error {
		if got := s.exec(t, a, "get", "http://app/", "20"); strings.Contains(got, b.Name) {
			return errors.New("traffic still goes to the unready pod")
		}
		return nil
	})
	if _, err := s.http(t.Context(), http.MethodPost, b.Status.PodIP, "8080", "/readyz", "true"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "readiness comes back", func() error { return ready(len(s.l.Nodes)) })
}

func (s *smoker) liveness(t *testing.T) {
	pod := s.on(t, s.l.Node(1))
	if _, err := s.http(t.Context(), http.MethodPost, pod.Status.PodIP, "8080", "/healthz", "false"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the container is started again", func() error {
		again := s.on(t, s.l.Node(1))
		if again.UID != pod.UID || again.Status.PodIP != pod.Status.PodIP {
			t.Fatalf("pod was replaced: %s", again.Name)
		}
		if cs := again.Status.ContainerStatuses; len(cs) != 1 || cs[0].RestartCount == 0 || !cs[0].Ready {
			return fmt.Errorf("container is %+v", cs)
		}
		return nil
	})
}

func (s *smoker) components(t *testing.T) {
	n, before := s.l.Node(1), s.on(t, s.l.Node(1))
	for _, component := range []string{lab.Containerd, lab.Kubelet, lab.KubeProxy} {
		if err := n.KillComponent(t.Context(), component); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.l.Restart(t.Context(), "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	if err := s.l.WaitForAPI(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "exec works again", func() error {
		_, err := s.l.Kubectl(t.Context(), "-n", "smoke", "exec", before.Name, "--", "/app", "get", "http://app/", "10")
		return err
	})
	after := s.on(t, n)
	if after.UID != before.UID || after.Status.ContainerStatuses[0].ContainerID != before.Status.ContainerStatuses[0].ContainerID {
		t.Errorf("the pod did not outlive them: %s, then %s", before.Status.ContainerStatuses[0].ContainerID, after.Status.ContainerStatuses[0].ContainerID)
	}
	if err := n.StopComponent(t.Context(), lab.Kubelet); err != nil {
		t.Fatal(err)
	}
	if err := n.KillComponent(t.Context(), lab.Kubelet); err == nil {
		t.Error("a stopped kubelet can be killed: it was not stopped")
	}
	if err := n.StartComponent(t.Context(), lab.Kubelet); err != nil {
		t.Fatal(err)
	}
}

func (s *smoker) powerCut(t *testing.T) {
	n, before := s.l.Node(2), s.on(t, s.l.Node(2))
	if _, err := n.Exec(t.Context(), "bash", "-c", "echo kept > /etc/cni/net.d/note; echo lost > /run/note; sync"); err != nil {
		t.Fatal(err)
	}
	if err := n.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := s.http(t.Context(), http.MethodGet, before.Status.PodIP, "8080", "/", ""); err == nil {
		t.Errorf("a pod of a node without power says %q", got)
	}
	if _, err := n.Exec(t.Context(), "true"); err == nil {
		t.Error("a node without power runs programs")
	}
	if err := n.PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := n.Exec(t.Context(), "bash", "-c", "cat /etc/cni/net.d/note; ls /run/note")
	if got != "kept\n" || err == nil {
		t.Errorf("after a power cut the notes are %q, %v; want the disk's and not the memory's", got, err)
	}
	eventually(t, "its pod is back", func() error {
		pod := s.on(t, n)
		if pod.UID != before.UID {
			t.Fatalf("pod was replaced by %s", pod.Name)
		}
		_, err := s.http(t.Context(), http.MethodGet, pod.Status.PodIP, "8080", "/", "")
		return err
	})
}
