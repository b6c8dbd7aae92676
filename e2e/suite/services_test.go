package suite_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/e2e/lab"
)

// stage is one namespace of TestServices: two of them are alike but that one is in the mesh.
type stage struct {
	*space
	meshed bool
	shift  int // of the ports that its pods take of nodes
	who    map[string]string
}

// script is what a stage is made of. Pods say their names; web's port is another in each of its pods.
const script = `
{apiVersion: v1, kind: Pod, metadata: {name: client, labels: {app: client}}, spec: {nodeName: NODE1, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: IMAGE}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-1, labels: {app: web, one: "yes"}}, spec: {nodeName: NODE1, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: IMAGE, args: [serve, ":8080", ":9000"], ports: [{name: web, containerPort: 8080}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-2, labels: {app: web, two: "yes"}}, spec: {nodeName: NODE2, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: IMAGE, args: [serve, ":8082", ":9000"], ports: [{name: web, containerPort: 8082, hostPort: HOSTPORT}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: unready, labels: {app: unready}}, spec: {nodeName: NODE2, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: IMAGE, readinessProbe: {tcpSocket: {port: 1}}}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: hosted, labels: {app: hosted}}, spec: {nodeName: NODE2, hostNetwork: true, terminationGracePeriodSeconds: 1,
  containers: [{name: app, image: IMAGE, args: [serve, ":PORT1", ":PORT2"]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: hostclient}, spec: {nodeName: NODE1, hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet,
  terminationGracePeriodSeconds: 1, containers: [{name: app, image: IMAGE, args: [wait, 1h]}]}}
---
{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: set}, spec: {serviceName: set, replicas: 2, podManagementPolicy: Parallel,
  selector: {matchLabels: {app: set}}, template: {metadata: {labels: {app: set}}, spec: {terminationGracePeriodSeconds: 1,
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: set}}}],
  containers: [{name: app, image: IMAGE}]}}}}
---
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ipFamilyPolicy: PreferDualStack, selector: {app: web}, ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-headless}, spec: {clusterIP: None, selector: {app: web, one: "yes"}, ports: [{port: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-node}, spec: {type: NodePort, selector: {app: web, two: "yes"}, ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-local}, spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: web, two: "yes"},
  ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-near}, spec: {internalTrafficPolicy: Local, selector: {app: web}, ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-far}, spec: {internalTrafficPolicy: Local, selector: {two: "yes"}, ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: web-sticky}, spec: {sessionAffinity: ClientIP, selector: {app: web}, ports: [{port: 80, targetPort: web}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: elsewhere}, spec: {type: ExternalName, externalName: web.SPACE.svc.cluster.local}}
---
{apiVersion: v1, kind: Service, metadata: {name: set}, spec: {clusterIP: None, selector: {app: set}, ports: [{port: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: self}, spec: {selector: {app: client}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: hosted}, spec: {selector: {app: hosted}, ports: [{port: 80, targetPort: PORT1}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: eager}, spec: {publishNotReadyAddresses: true, selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: patient}, spec: {selector: {app: unready}, ports: [{port: 80, targetPort: 8080}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: udp}, spec: {selector: {app: web, two: "yes"}, ports: [{name: udp, port: 9000, protocol: UDP}]}}
`

// refusedAnswer is what a question comes to that nobody answers.
const refusedAnswer = "nobody"

// question is one way to reach a server. Answers are "SERVER sees CLIENT", each once; one that begins with "?" is as good as
// that it does not come.
type question struct {
	name   string
	by     string // the pod that asks; "": a process outside of the cluster
	url    func(*stage) string
	times  int // 0: once
	want   []string
	meshed []string // where the mesh has another answer; nil: it has none
	clear  bool     // not in a tunnel, or not between nodes
}

func fixed(url string) func(*stage) string { return func(*stage) string { return url } }

// questions are in the order of the issue. The mesh's answer is another than Kubernetes' own in two places. A pod that calls
// itself by its service sees itself, and no gateway between. And what is on a node's own network is taken for the kubelet by
// pods of that node, as in Istio.
var questions = []question{
	{name: "ClusterIP, and a port that is another in each pod", by: "client", url: fixed("http://web/"), times: 24,
		want: []string{"web-1 sees client", "web-2 sees client"}},
	{name: "headless", by: "client", url: fixed("http://web-headless:8080/"), want: []string{"web-1 sees client"}, clear: true},
	{name: "NodePort from outside, at the node of the pod", url: nodePort("web-node", 2), want: []string{"web-2 sees gateway2"}, clear: true},
	{name: "NodePort from outside, at another node", url: nodePort("web-node", 1), want: []string{"web-2 sees node1"}, clear: true},
	{name: "NodePort from a pod", by: "client", url: nodePort("web-node", 2), want: []string{"web-2 sees gateway2"}, clear: true},
	{name: "externalTrafficPolicy Local, at the node of the pod", url: nodePort("web-local", 2), want: []string{"web-2 sees outside"}, clear: true},
	{name: "externalTrafficPolicy Local, at another node", url: nodePort("web-local", 1), want: []string{refusedAnswer}, clear: true},
	{name: "internalTrafficPolicy Local", by: "client", url: fixed("http://web-near/"), times: 12, want: []string{"web-1 sees client"}, clear: true},
	{name: "internalTrafficPolicy Local with nobody near", by: "client", url: fixed("http://web-far/"), want: []string{refusedAnswer}, clear: true},
	{name: "ExternalName", by: "client", url: fixed("http://elsewhere/"), times: 24, want: []string{"web-1 sees client", "web-2 sees client"}},
	{name: "a pod's own service", by: "client", url: fixed("http://self/"), want: []string{"client sees gateway1"}, meshed: []string{"client sees client"}, clear: true},
	{name: "a pod's own address", by: "client", url: podAddr("client", "8080"), want: []string{"client sees client"}, clear: true},
	{name: "another pod's address", by: "client", url: podAddr("web-2", "8082"), want: []string{"web-2 sees client"}},
	{name: "the name of a pod of a StatefulSet", by: "client", url: fixed("http://set-0.set:8080/"), want: []string{"set-0 sees client"}},
	{name: "the name of another pod of a StatefulSet", by: "client", url: fixed("http://set-1.set:8080/"), want: []string{"set-1 sees client"}},
	{name: "a server on its node's network", by: "client", url: fixed("http://hosted/"), want: []string{"hosted sees client"}, clear: true},
	{name: "a client on its node's network", by: "hostclient", url: fixed("http://web-headless:8080/"), want: []string{"web-1 sees gateway1"},
		meshed: []string{"web-1 sees prober"}, clear: true},
	{name: "a client on its node's network, by ClusterIP", by: "hostclient", url: fixed("http://web/"), times: 24,
		want: []string{"web-1 sees gateway1", "web-2 sees node1"}, meshed: []string{"web-1 sees prober", "web-2 sees node1"}, clear: true},
	{name: "a hostPort from outside", url: func(s *stage) string { return fmt.Sprintf("http://%s:%d/", cluster.Node(2).IP, 28080+s.shift) },
		want: []string{"web-2 sees outside"}, clear: true},
	{name: "a hostPort from a pod of another node", by: "client", url: func(s *stage) string { return fmt.Sprintf("http://%s:%d/", cluster.Node(2).IP, 28080+s.shift) },
		want: []string{"web-2 sees client"}, clear: true},
	{name: "publishNotReadyAddresses", by: "client", url: fixed("http://eager/"), want: []string{"unready sees client"}},
	{name: "a service whose pods are not ready", by: "client", url: fixed("http://patient/"), want: []string{refusedAnswer}, clear: true},
	{name: "UDP", by: "client", url: fixed("udp://udp:9000"), want: []string{"web-2 sees client"}, clear: true},
}

// dualQuestions are asked of both address families.
var dualQuestions = []question{
	{name: "ClusterIP of IPv4", by: "client", url: clusterIP("web", false), times: 24, want: []string{"web-1 sees client", "web-2 sees client"}},
	{name: "ClusterIP of IPv6", by: "client", url: clusterIP("web", true), times: 24, want: []string{"web-1 sees client6", "web-2 sees client6"}},
	{name: "a pod's address of IPv6", by: "client", url: podAddr6("web-2", "8082"), want: []string{"web-2 sees client6"}},
	{name: "a pod's own address of IPv6", by: "client", url: podAddr6("client", "8080"), want: []string{"client sees client6"}, clear: true},
}

func nodePort(service string, node int) func(*stage) string {
	return func(s *stage) string {
		return fmt.Sprintf("http://%s:%d/", cluster.Node(node).IP, s.service(service).Spec.Ports[0].NodePort)
	}
}

func podAddr(pod, port string) func(*stage) string {
	return func(s *stage) string { return "http://" + net.JoinHostPort(s.pod(pod).Status.PodIP, port) + "/" }
}

func podAddr6(pod, port string) func(*stage) string {
	return func(s *stage) string {
		return "http://" + net.JoinHostPort(s.pod(pod).Status.PodIPs[1].IP, port) + "/"
	}
}

func clusterIP(service string, six bool) func(*stage) string {
	return func(s *stage) string {
		for _, ip := range s.service(service).Spec.ClusterIPs {
			if a, err := netip.ParseAddr(ip); err == nil && a.Is6() == six {
				return "http://" + net.JoinHostPort(ip, "80") + "/"
			}
		}
		s.Fatalf("%s has no such address", service)
		return ""
	}
}

// TestServices: whatever way a server is reached, its answer is the one that it gives without the mesh, and between nodes it
// is only seen in a tunnel, where a tunnel is promised.
func TestServices(t *testing.T) {
	plain, mesh := newStage(t, "e2e-plain", false, 0), newStage(t, "e2e-services", true, 10)
	plain.set()
	mesh.set()
	all := questions
	if cluster.DualStack() {
		all = slices.Concat(all, dualQuestions)
	}
	seen := make(map[string][]byte) // words of questions, for the capture
	wire := mesh.capture()
	for i, q := range all {
		t.Run(q.name, func(t *testing.T) {
			plain, mesh := plain.under(t), mesh.under(t)
			check := func(s *stage, want []string) {
				words := fmt.Sprintf("?words-%t-%d", s.meshed, i)
				if s.meshed && !q.clear {
					seen[q.name] = []byte(words)
				}
				s.eventually("the answers to "+s.name, func() error { // endpoints take their time
					if got := s.ask(q, words); !slices.Equal(got, want) {
						return fmt.Errorf("got %q, want %q", got, want)
					}
					return nil
				})
			}
			check(plain, q.want)
			if q.meshed != nil {
				q.want = q.meshed
			}
			check(mesh, q.want)
		})
	}
	t.Run("session affinity ClientIP", func(t *testing.T) {
		for _, s := range []*stage{plain.under(t), mesh.under(t)} {
			q := question{by: "client", url: fixed("http://web-sticky/"), times: 24}
			first := s.ask(q, "")
			if len(first) != 1 || first[0] == refusedAnswer {
				t.Errorf("%s: %q answered, want one server and always the same", s.name, first)
			}
		}
	})
	t.Run("what is promised a tunnel is in one", func(t *testing.T) {
		mesh := mesh.under(t)
		mesh.must(wire.Stop())
		if !wire.Contains([]byte("words-false-0")) {
			t.Error("plain traffic between nodes is not seen on the wire: the capture is blind")
		}
		for name, words := range seen {
			if wire.Contains(words[1:]) {
				t.Errorf("%s: passed between the nodes in the clear", name)
			}
		}
	})
	mesh.undisturbed()
}

// TestPodsThatEnd: what a pod leaves when it ends or starts again is nothing.
func TestPodsThatEnd(t *testing.T) {
	s := newSpace(t, "e2e-ends", true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "client", node: one})
	s.redirected(true)
	t.Run("Jobs that end leave nothing", func(t *testing.T) {
		s := &space{t, s.name}
		s.must(cluster.Apply(t.Context(), fmt.Sprintf(`{apiVersion: batch/v1, kind: Job, metadata: {name: job, namespace: %s}, spec: {completions: 5, parallelism: 2, backoffLimit: 0,
			template: {spec: {nodeName: %s, restartPolicy: Never, containers: [{name: app, image: %q, args: [get, "http://server/", "5"]}]}}}}`,
			s.name, one.Name, lab.AppImage)))
		s.eventually("the job is complete", func() error {
			job, err := cluster.Client().BatchV1().Jobs(s.name).Get(t.Context(), "job", metav1.GetOptions{})
			if err == nil && job.Status.Failed > 0 {
				t.Fatalf("a pod failed: %+v", job.Status)
			}
			if err == nil && job.Status.Succeeded != 5 {
				err = fmt.Errorf("%d succeeded", job.Status.Succeeded)
			}
			return err
		})
		s.eventually("ztunnel serves the pods that run, and no others", func() error {
			pods, err := cluster.Client().CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "status.phase=Running,spec.nodeName=" + one.Name})
			if err != nil {
				return err
			}
			in := 0
			for _, p := range pods.Items {
				if p.Annotations[redirection] == "enabled" {
					in++
				}
			}
			if now := s.proxies(one); now != float64(in) || in == 0 {
				return fmt.Errorf("it serves %v, and %d run", now, in)
			}
			return nil
		})
	})

	t.Run("a container that fails is started in the mesh again", func(t *testing.T) {
		s := &space{t, s.name}
		before := s.pod("server").Status
		_, _ = s.run("client", "post", "http://server/exit", "")
		s.eventually("it was started again", func() error {
			now := s.pod("server").Status
			if now.PodIP != before.PodIP {
				t.Fatalf("the address went from %s to %s", before.PodIP, now.PodIP)
			}
			if cs := now.ContainerStatuses; len(cs) != 1 || cs[0].RestartCount == 0 || !cs[0].Ready {
				return fmt.Errorf("container is %+v", cs)
			}
			return nil
		})
		s.eventually("it serves", func() error { _, err := s.run("client", "get", "http://server/"); return err })
		wire := s.capture()
		s.get("client", "http://server/?after-the-crash")
		s.tunnelled(wire, "after-the-crash")
	})
}

func newStage(t *testing.T, name string, meshed bool, shift int) *stage {
	t.Helper()
	return &stage{space: newSpace(t, name, meshed), meshed: meshed, shift: shift}
}

// under is the same stage in another test.
func (s *stage) under(t *testing.T) *stage {
	c := *s
	c.space = &space{t, s.name}
	return &c
}

// set makes all there is, and learns whose addresses are whose.
func (s *stage) set() {
	s.Helper()
	yaml := strings.NewReplacer("IMAGE", lab.AppImage, "SPACE", s.name, "NODE1", cluster.Node(1).Name, "NODE2", cluster.Node(2).Name,
		"HOSTPORT", fmt.Sprint(28080+s.shift), "PORT1", fmt.Sprint(18080+s.shift), "PORT2", fmt.Sprint(19000+s.shift)).Replace(script)
	s.must(cluster.Apply(s.Context(), yaml, "-n", s.name))
	names := []string{"client", "web-1", "web-2", "hosted", "hostclient", "set-0", "set-1"}
	for _, name := range names {
		s.ready(name)
	}
	s.eventually("unready runs", func() error {
		if p := s.pod("unready"); p.Status.Phase != corev1.PodRunning {
			return fmt.Errorf("it is %s", p.Status.Phase)
		}
		return nil
	})
	s.who = map[string]string{"10.89.0.1": "outside", "169.254.7.127": "prober"}
	for i, n := range cluster.Nodes {
		s.who[n.IP.String()], s.who[n.IP6.String()] = n.Name, n.Name+"-6"
		s.who[n.PodCIDR.Addr().Next().String()] = fmt.Sprint("gateway", i+1)
	}
	for _, p := range s.pods() {
		for i, ip := range p.Status.PodIPs {
			if p.Spec.HostNetwork {
				continue
			}
			s.who[ip.IP] = p.Name + []string{"", "6"}[i]
		}
	}
	if !s.meshed {
		return
	}
	s.eventually("all are redirected", func() error {
		for _, p := range s.pods() {
			if got := p.Annotations[redirection]; !p.Spec.HostNetwork && got != "enabled" {
				return fmt.Errorf("%s has %s=%q", p.Name, redirection, got)
			}
		}
		return nil
	})
	// Every proxy has heard of every pod by the time that it reaches it in a tunnel.
	s.eventually("all are reached in tunnels", func() error {
		for _, p := range []struct{ name, port string }{{"web-2", "8082"}, {"unready", "8080"}, {"set-0", "8080"}, {"set-1", "8080"}} {
			for _, ip := range s.pod(p.name).Status.PodIPs {
				c, err := cluster.Capture(context.WithoutCancel(s.Context()))
				s.must(err)
				_, err = s.run("client", "get", "http://"+net.JoinHostPort(ip.IP, p.port)+"/?are-we-there")
				s.must(c.Stop())
				if err != nil {
					return err
				}
				if c.Contains([]byte("are-we-there")) {
					return fmt.Errorf("%s is reached in the clear", p.name)
				}
			}
		}
		return nil
	})
}

func (s *stage) service(name string) *corev1.Service {
	s.Helper()
	svc, err := cluster.Client().CoreV1().Services(s.name).Get(s.Context(), name, metav1.GetOptions{})
	s.must(err)
	return svc
}

// ask returns the answers in order, each once.
func (s *stage) ask(q question, words string) []string {
	s.Helper()
	url := q.url(s)
	var out string
	var err error
	switch addr, udp := strings.CutPrefix(url, "udp://"); {
	case udp:
		out, err = s.run(q.by, "udp", addr, words)
	case q.by == "":
		out, err = fromOutside(s.Context(), url+words)
	default:
		out, err = s.run(q.by, "get", url+words, fmt.Sprint(max(q.times, 1)))
	}
	if err != nil {
		s.Logf("%s: %v", s.name, err)
		return []string{refusedAnswer}
	}
	var all []string
	for line := range strings.Lines(out) {
		before, after, ok := strings.Cut(line, " sees=")
		if !ok {
			s.Fatalf("no answer: %q", line)
		}
		before, _, _ = strings.Cut(before, " node=")
		server := before[strings.LastIndexByte(before, ' ')+1:]
		addr, _, _ := strings.Cut(strings.TrimSpace(after), " ")
		if name, ok := s.who[addr]; ok {
			addr = name
		}
		// What is on a node's network bears the node's name.
		if slices.ContainsFunc(cluster.Nodes, func(n *lab.Node) bool { return n.Name == server }) {
			server = "hosted"
		}
		all = append(all, server+" sees "+addr)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// fromOutside asks from the network that the nodes are on.
func fromOutside(ctx context.Context, url string) (string, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: cluster.DialContext}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	return string(body), err
}

// proxies is how many pods the node's ztunnel serves.
func (s *space) proxies(n *lab.Node) (count float64) {
	s.Helper()
	s.eventually("ztunnel's metrics", func() error {
		pod, err := cluster.Client().CoreV1().Pods("istio-system").Get(s.Context(), ztunnelOn(s, n.Name), metav1.GetOptions{})
		if err != nil {
			return err
		}
		text, err := fromOutside(s.Context(), "http://"+net.JoinHostPort(pod.Status.PodIP, "15020")+"/metrics")
		if err != nil {
			return err
		}
		for line := range strings.Lines(text) {
			if _, err := fmt.Sscanf(line, "workload_manager_active_proxy_count %g", &count); err == nil {
				return nil
			}
		}
		return errors.New("it does not tell how many pods it serves")
	})
	return count
}
