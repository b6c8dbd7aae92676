package cni_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/internal/daemon"
)

// cluster is a node in a cluster with a fake API server.
type cluster struct {
	*node
	api  *fake.Clientset
	down atomic.Bool // requests fail; watches stay
	env  *daemon.Env
}

func newCluster(t *testing.T, objects ...runtime.Object) *cluster {
	t.Helper()
	c := &cluster{node: newNode(t)}
	objects = append(objects, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-cni-node"}})
	c.api = fake.NewClientset(objects...)
	c.api.PrependReactor("*", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if c.down.Load() && a.GetVerb() != "watch" {
			return true, nil, errors.New("the API server is down")
		}
		return false, nil, nil
	})
	return c
}

func ns(name, mode string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	if mode != "" {
		n.Labels["istio.io/dataplane-mode"] = mode
	}
	return n
}

func pod(namespace, name, uid string, edits ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{NodeName: "node-1", ServiceAccountName: "sa-" + name},
	}
	for _, e := range edits {
		e(p)
	}
	return p
}

func running(p *corev1.Pod) {
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.9.0.5", PodIPs: []corev1.PodIP{{IP: "10.9.0.5"}, {IP: "fd09::5"}}}
}

func announced(as string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{"ambient.istio.io/redirection": as} }
}

// launch runs an agent until stop is called, or the test ends.
func (c *cluster) launch() (stop func()) {
	c.t.Helper()
	env, err := daemon.NewEnv("cni-agent", c.t.Output(), daemon.LogOptions{Level: "debug"})
	if err != nil {
		c.t.Fatal(err)
	}
	c.env = env
	cfg := cni.Config{
		Source: cni.SourceKubernetes, Client: c.api, Node: "node-1", Namespace: "istio-system", DaemonSet: cni.DefaultDaemonSet,
		RunDir: c.dir("run"), ZDSSocket: c.dir("z"), ProcDir: "/proc", RepairEvery: time.Second,
		Policy: cni.Policy{ExcludeNamespaces: []string{"kube-system"}},
	}
	if c.config != nil {
		c.config(&cfg)
	}
	return c.run(cfg, env)
}

// announces waits until the API server's pod has the annotation, "" for none.
func (c *cluster) announces(namespace, name, want string) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%s/%s announces %q", namespace, name, want), func() bool {
		p, err := c.api.Tracker().Get(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, namespace, name)
		return err == nil && p.(*corev1.Pod).Annotations["ambient.istio.io/redirection"] == want
	})
}

func (c *cluster) label(namespace, mode string) {
	c.t.Helper()
	if _, err := c.api.CoreV1().Namespaces().Update(c.t.Context(), ns(namespace, mode), metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func TestAPodOfTheClusterJoinsAndLeaves(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1"))
	c.launch()
	z, _ := c.ztunnel()
	z.expect("synced []")
	s := newSandbox(t)
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	if !s.captured() {
		t.Error("the pod is not captured when ADD returns")
	}
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	c.announces("shop", "web-1", "enabled")
	for _, a := range c.api.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok {
			want := `{"metadata":{"annotations":{"ambient.istio.io/redirection":"enabled"},"uid":"u-1"}}`
			if p.GetSubresource() != "status" || p.GetPatchType() != types.MergePatchType || string(p.GetPatch()) != want {
				t.Errorf("patch of %q with %s %s, want of status with %s", p.GetSubresource(), p.GetPatchType(), p.GetPatch(), want)
			}
		}
	}
	c.label("shop", "")
	z.await("del u-1")
	c.announces("shop", "web-1", "")
	c.eventually("the rules are gone", func() bool { return !strings.Contains(s.exec("iptables", "-t", "nat", "-S"), "ISTIO_") })
	c.label("shop", "ambient")
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	c.announces("shop", "web-1", "enabled")

	// Somebody writes over the annotation: it comes back.
	if _, err := c.api.CoreV1().Pods("shop").Update(t.Context(), pod("shop", "web-1", "u-1"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.announces("shop", "web-1", "enabled")
}

func TestAPodTheWatchHasNotBroughtIsAskedFor(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"))
	var answer atomic.Pointer[corev1.Pod]
	c.api.PrependReactor("get", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		if p := answer.Load(); p != nil {
			return true, p, nil
		}
		return true, nil, apierrors.NewNotFound(schema.GroupResource{Resource: "pods"}, "web-1")
	})
	c.launch()
	z, _ := c.ztunnel()
	z.expect("synced []")
	s := newSandbox(t)
	c.refuses(s.event("shop", "web-1", "u-1", "c-1"), http.StatusServiceUnavailable, `the API server says: pods "web-1" not found`)
	answer.Store(pod("shop", "web-1", "u-1", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }))
	c.refuses(s.event("shop", "web-1", "u-1", "c-1"), http.StatusServiceUnavailable, `pod is on node "node-2", not on "node-1"`)
	answer.Store(pod("shop", "web-1", "u-1"))
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
}

func TestTheAPIServerIsDown(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1"), pod("shop", "web-2", "u-2"))
	stop := c.launch()
	z, _ := c.ztunnel()
	z.expect("synced []")
	c.down.Store(true)
	s, s2 := newSandbox(t), newSandbox(t)
	began := time.Now()
	c.refuses(s.event("shop", "stranger", "u-9", "c-9"), http.StatusServiceUnavailable, "pod shop/stranger is not known")
	if d := time.Since(began); d > plugin.Timeout {
		t.Errorf("ADD of an unknown pod took %v: the plugin does not wait longer than %v", d, plugin.Timeout)
	}
	// What is known is served from memory; only the announcement waits.
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	c.announces("shop", "web-1", "")
	c.down.Store(false)
	c.announces("shop", "web-1", "enabled")
	stop()

	// An agent that starts without the API server goes on with the pods it remembers.
	c.down.Store(true)
	s.exec("iptables", "-t", "nat", "-F", "ISTIO_OUTPUT")
	started := make(chan func(), 1)
	go func() { started <- c.launch() }()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	c.refuses(s2.event("shop", "web-2", "u-2", "c-2"), http.StatusServiceUnavailable, "not read yet")
	c.eventually("the rules are repaired", s.captured)
	c.down.Store(false)
	<-started
	c.add(s2.event("shop", "web-2", "u-2", "c-2"))
}

func TestMangledRulesAreRepaired(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1"))
	c.launch()
	c.ztunnel()
	s := newSandbox(t)
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	s.exec("iptables", "-t", "nat", "-D", "OUTPUT", "-j", "ISTIO_OUTPUT")
	c.eventually("the rules are repaired", func() bool {
		code, _ := c.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1"))
		return code == http.StatusOK
	})
}

func TestTheNodeIsCleanedOnlyWhenTheDaemonSetGoes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1"))
	conf, bin := c.dir("conf"), c.dir("bin")
	list := `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`
	binary := filepath.Join(c.dir("run"), "plugin")
	for path, content := range map[string]string{filepath.Join(conf, "10-k8s.conflist"): list, binary: "plugin"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	c.config = func(cfg *cni.Config) { cfg.CNIConfDir, cfg.CNIBinDir, cfg.CNIPlugin = conf, bin, binary }
	installed := func() bool {
		b, err := os.ReadFile(filepath.Join(conf, "10-k8s.conflist"))
		_, berr := os.Stat(filepath.Join(bin, "istio-cni"))
		if err != nil || strings.Contains(string(b), "istio-cni") != (berr == nil) {
			t.Errorf("conflist %s, %v; binary: %v: neither installed nor not", b, err, berr)
		}
		return berr == nil
	}
	stop := c.launch()
	c.ztunnel()
	c.eventually("the agent is ready", func() bool { return len(c.env.Ready.Waiting()) == 0 })
	s := newSandbox(t)
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	c.announces("shop", "web-1", "enabled")
	stop() // an upgrade
	if !installed() || !s.captured() {
		t.Fatalf("an upgrade takes things away: installed %v, captured %v", installed(), s.captured())
	}
	stop = c.launch()
	c.down.Store(true) // nobody can say
	stop()
	if !installed() || !s.captured() {
		t.Fatal("an agent that cannot ask takes things away")
	}
	c.down.Store(false)
	stop = c.launch()
	if err := c.api.AppsV1().DaemonSets("istio-system").Delete(t.Context(), "istio-cni-node", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stop()
	if installed() || s.captured() {
		t.Errorf("uninstallation leaves things: installed %v, captured %v", installed(), s.captured())
	}
	if b, err := os.ReadFile(filepath.Join(conf, "10-k8s.conflist")); err != nil || string(b) != list {
		t.Errorf("conflist is %s, %v; want %s", b, err, list)
	}
	c.announces("shop", "web-1", "")
	left, err := os.ReadDir(c.dir("run"))
	if err != nil || len(left) != 1 {
		t.Errorf("run directory holds %v, %v; want only the test's own plugin", left, err)
	}
}

// ended is a pod whose announcement outlived it: nobody serves it, nobody withdraws it.
func ended(p *corev1.Pod) {
	announced("enabled")(p)
	p.Status.Phase = corev1.PodSucceeded
}

func TestUninstallationTakesLeftoverAnnouncements(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "job-1", "u-2", ended))
	stop := c.launch()
	if err := c.api.AppsV1().DaemonSets("istio-system").Delete(t.Context(), "istio-cni-node", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stop()
	c.announces("shop", "job-1", "")
}

func TestUninstallByHandWithoutMemory(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1", running), pod("shop", "job-1", "u-2", ended))
	stop := c.launch()
	c.ztunnel()
	s := newSandbox(t)
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	c.announces("shop", "web-1", "enabled")
	stop()
	if err := os.Remove(filepath.Join(c.dir("run"), "pods.json")); err != nil {
		t.Fatal(err)
	}
	tree := newProcTree(t)
	s.sleeper()
	tree.process(100, 1, "0::/kubepods/podu-1/c\n", s.path())
	env, err := daemon.NewEnv("cni-agent", t.Output(), daemon.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := cni.Config{
		Source: cni.SourceKubernetes, Client: c.api, Node: "node-1", RunDir: c.dir("run"), ProcDir: tree.dir,
		CNIConfDir: c.dir("conf"), CNIBinDir: c.dir("bin"), Uninstall: true,
	}
	if err := cni.Main(t.Context(), cfg, env); err != nil {
		t.Fatal(err)
	}
	c.announces("shop", "web-1", "")
	c.announces("shop", "job-1", "")
	if s.captured() {
		t.Error("rules are left in a running pod")
	}
}

func TestUninstallationWithoutTheAPIServer(t *testing.T) {
	t.Parallel()
	c := newCluster(t, ns("shop", "ambient"), pod("shop", "web-1", "u-1"))
	stop := c.launch()
	c.ztunnel()
	s := newSandbox(t)
	c.add(s.event("shop", "web-1", "u-1", "c-1"))
	c.announces("shop", "web-1", "enabled")
	// Permissions go with the DaemonSet: only the watch brings the news.
	events := func() bool { return strings.Contains(c.watched(), "daemonsets") }
	c.eventually("the DaemonSet is watched", events)
	if err := c.api.AppsV1().DaemonSets("istio-system").Delete(t.Context(), "istio-cni-node", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.down.Store(true)
	stop()
	if s.captured() {
		t.Error("the pod is still captured, and nobody is there to serve it")
	}
}

// watched lists the resources that are watched.
func (c *cluster) watched() string {
	var out []string
	for _, a := range c.api.Actions() {
		if a.GetVerb() == "watch" {
			out = append(out, a.GetResource().Resource)
		}
	}
	return strings.Join(out, " ")
}

func (c *cluster) tainted() bool {
	n, err := c.api.CoreV1().Nodes().Get(c.t.Context(), "node-1", metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == cni.DefaultTaint })
}

func TestTheTaintComesWhileTheAgentIsNotReady(t *testing.T) {
	t.Parallel()
	c := newCluster(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}})
	conf := c.dir("net.d")
	if err := os.Mkdir(conf, 0o755); err != nil {
		t.Fatal(err)
	}
	c.config = func(cfg *cni.Config) {
		cfg.Untaint, cfg.Taint = cni.DefaultTaint, true
		cfg.CNIConfDir, cfg.CNIBinDir, cfg.CNIPlugin = conf, c.dir("bin"), "/bin/true"
	}
	stop := c.launch()
	c.eventually("an agent without a network to extend taints its node", c.tainted)
	list := filepath.Join(conf, "10-k8s.conflist")
	if err := os.WriteFile(list, []byte(`{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c.eventually("one that is ready does not", func() bool { return !c.tainted() })
	stop()
	if !c.tainted() {
		t.Error("an agent that another follows leaves its node without a taint")
	}
	stop = c.launch()
	c.eventually("its follower takes it off", func() bool { return !c.tainted() })
	if err := c.api.AppsV1().DaemonSets("istio-system").Delete(t.Context(), cni.DefaultDaemonSet, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	stop()
	if c.tainted() {
		t.Error("the mesh left the node, and its taint stays")
	}
}

func TestTheTaintGoesWhenTheAgentIsReady(t *testing.T) {
	t.Parallel()
	other := corev1.Taint{Key: "gpu", Effect: corev1.TaintEffectNoSchedule}
	c := newCluster(t, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node-1"},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: cni.DefaultTaint, Effect: corev1.TaintEffectNoSchedule}, other, {Key: cni.DefaultTaint, Effect: corev1.TaintEffectNoExecute},
		}},
	})
	c.config = func(cfg *cni.Config) { cfg.Untaint = cni.DefaultTaint }
	c.launch()
	c.eventually("only the other taint is left", func() bool {
		n, err := c.api.CoreV1().Nodes().Get(t.Context(), "node-1", metav1.GetOptions{})
		return err == nil && len(n.Spec.Taints) == 1 && n.Spec.Taints[0] == other
	})
}
