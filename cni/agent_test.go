package cni_test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/install"
	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/internal/daemon"
)

func (n *node) add(ev plugin.Event) {
	n.t.Helper()
	if code, text := n.ask(http.MethodPost, plugin.PathAdd, ev); code != http.StatusOK {
		n.t.Fatalf("cmdadd %s/%s = %d %s, want 200", ev.PodNamespace, ev.PodName, code, text)
	}
}

func (n *node) refuses(ev plugin.Event, wantCode int, words string) {
	n.t.Helper()
	code, text := n.ask(http.MethodPost, plugin.PathAdd, ev)
	if code != wantCode || !strings.Contains(text, words) {
		n.t.Errorf("cmdadd %s/%s = %d %q, want %d with %q", ev.PodNamespace, ev.PodName, code, text, wantCode, words)
	}
}

func TestAddEnrolsAPodOfAnAmbientNamespace(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	z, _ := n.ztunnel()
	z.expect("synced []")
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	if !s.captured() {
		t.Error("the pod is not captured when ADD returns")
	}
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	got := n.redirection("shop/web-1", "enabled")
	want := corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: "10.9.0.5", PodIPs: []corev1.PodIP{{IP: "10.9.0.5"}, {IP: "fd09::5"}},
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
	}
	if d := cmp.Diff(want, got.Status); d != "" {
		t.Errorf("status (-want +got):\n%s", d)
	}
	// The runtime may repeat itself.
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))

	if code, text := n.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1")); code != http.StatusOK {
		t.Errorf("cmdcheck = %d %s, want 200", code, text)
	}
	s.exec("iptables", "-t", "nat", "-F", "ISTIO_OUTPUT")
	code, text := n.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1"))
	if code != http.StatusConflict || !strings.Contains(text, "ISTIO_OUTPUT") {
		t.Errorf("cmdcheck of damaged rules = %d %s, want 409 that names the chain", code, text)
	}

	n.ask(http.MethodPost, plugin.PathDel, s.event("shop", "web-1", "u-1", "another"))
	if code, _ := n.ask(http.MethodPost, plugin.PathDel, s.event("shop", "web-1", "u-1", "c-1")); code != http.StatusOK {
		t.Errorf("cmddel = %d, want 200", code)
	}
	z.expect("del u-1")
	n.redirection("shop/web-1", "gone")
}

func TestAddLeavesOtherPodsAlone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("all.yaml", namespace("plain", "")+podYAML("plain", "web-1", "u-1", "")+
		podYAML("kube-system", "dns", "u-2", "  labels: {istio.io/dataplane-mode: ambient}\n"))
	n.start()
	for _, c := range []struct{ namespace, name, uid string }{{"plain", "web-1", "u-1"}, {"kube-system", "dns", "u-2"}} {
		s := newSandbox(t)
		n.add(s.event(c.namespace, c.name, c.uid, "c-"+c.uid)) // without a ztunnel: they do not need one
		if s.captured() {
			t.Errorf("%s/%s is captured", c.namespace, c.name)
		}
		if got := n.redirection(c.namespace+"/"+c.name, "").Status.PodIP; got != "10.9.0.5" {
			t.Errorf("%s/%s has podIP %q in its status", c.namespace, c.name, got)
		}
	}
}

func TestAddWithoutZtunnelFailsClosed(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	s := newSandbox(t)
	n.refuses(s.event("shop", "web-1", "u-1", "c-1"), http.StatusServiceUnavailable, "no ztunnel is connected")
	n.redirection("shop/web-1", "gone")
	if !s.captured() {
		t.Error("a pod that was refused is not captured: a runtime that starts it nevertheless leaks plaintext")
	}
	n.ask(http.MethodPost, plugin.PathDel, s.event("shop", "web-1", "u-1", "c-1"))

	// The runtime tries again with a new sandbox, and this time a ztunnel comes while ADD waits.
	s2 := newSandbox(t)
	added := make(chan int, 1)
	go func() {
		code, _ := n.ask(http.MethodPost, plugin.PathAdd, s2.event("shop", "web-1", "u-1", "c-2"))
		added <- code
	}()
	n.redirection("shop/web-1", "pending")
	z, _ := n.ztunnel()
	if code := <-added; code != http.StatusOK {
		t.Errorf("cmdadd = %d, want 200 once a ztunnel is there", code)
	}
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s2.id()))
	n.redirection("shop/web-1", "enabled")
}

func TestAddThatZtunnelRefuses(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	z, _ := n.ztunnel()
	z.expect("synced []")
	why := errors.New("port 15008 is in use")
	z.refuse.Store(&why)
	s := newSandbox(t)
	n.refuses(s.event("shop", "web-1", "u-1", "c-1"), http.StatusServiceUnavailable, "port 15008 is in use")
	n.redirection("shop/web-1", "gone")
}

func TestAddOfWhatCannotBe(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	s := newSandbox(t)
	n.refuses(s.event("shop", "stranger", "u-9", "c-1"), http.StatusServiceUnavailable, "is not known")
	n.refuses(s.event("shop", "web-1", "another-uid", "c-1"), http.StatusServiceUnavailable, "is not known")
	gone := newSandbox(t)
	ev := gone.event("shop", "web-1", "u-1", "c-1")
	gone.destroy()
	n.refuses(ev, http.StatusServiceUnavailable, "vanished")
	ev.Netns = ""
	n.refuses(ev, http.StatusBadRequest, "Netns is missing")
	ev.PodName = "../../etc/passwd"
	n.refuses(ev, http.StatusBadRequest, "is not a name")
	if code, _ := n.ask(http.MethodPost, plugin.PathAdd, "no event"); code != http.StatusBadRequest {
		t.Errorf("cmdadd of nonsense = %d, want 400", code)
	}
	if s.captured() {
		t.Error("a namespace was touched")
	}
}

func TestAddWhileTheNamespaceCannotBeRead(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("pod.yaml", podYAML("shop", "web-1", "u-1", ""))
	n.write("shop.yaml", namespace("shop", "ambient")+"kind: Namespace\n") // a key twice
	n.start()
	s := newSandbox(t)
	n.refuses(s.event("shop", "web-1", "u-1", "c-1"), http.StatusServiceUnavailable, "may be what cannot be read in shop.yaml")
	n.write("shop.yaml", namespace("shop", ""))
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	n.redirection("shop/web-1", "")
}

func TestAddOfAPodThatIsWrittenMeanwhile(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	s := newSandbox(t)
	added := make(chan int, 1)
	go func() {
		code, _ := n.ask(http.MethodPost, plugin.PathAdd, s.event("plain", "web-1", "u-1", "c-1"))
		added <- code
	}()
	n.write("late.yaml", podYAML("plain", "web-1", "u-1", ""))
	if code := <-added; code != http.StatusOK {
		t.Errorf("cmdadd = %d, want 200", code)
	}
}

func TestLabelsOfARunningPod(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	pods := podYAML("shop", "web-1", "u-1", "") + podYAML("shop", "cart-1", "u-2", "  labels: {istio.io/dataplane-mode: none}\n")
	n.write("shop.yaml", namespace("shop", "")+pods)
	n.start()
	s, other := newSandbox(t), newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	n.add(other.event("shop", "cart-1", "u-2", "c-2"))
	n.redirection("shop/web-1", "")
	if s.captured() {
		t.Fatal("captured without a label")
	}

	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	n.redirection("shop/web-1", "pending") // no ztunnel yet
	if s.captured() {
		t.Error("a running pod is captured with nobody to serve it: its connections are refused")
	}
	z, stop := n.ztunnel()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	n.redirection("shop/web-1", "enabled")
	if !s.captured() {
		t.Error("announced before it is captured")
	}

	// Without a ztunnel nothing leaks: a pod that was captured stays so.
	stop()
	if !s.captured() {
		t.Error("released because ztunnel is gone")
	}
	z, stop = n.ztunnel()
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	z.expect("synced [u-1]")

	// Another ztunnel is told of the pod at once; the pod stays announced in between.
	stop()
	z, _ = n.ztunnel()
	z.expect(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	z.expect("synced [u-1]")

	n.write("shop.yaml", namespace("shop", "")+pods)
	z.await("del u-1")
	n.redirection("shop/web-1", "")
	if s.captured() {
		t.Error("rules are left after the label was removed")
	}

	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	n.redirection("shop/web-1", "enabled")
	if !s.captured() {
		t.Error("not captured after the label came back")
	}
	if other.captured() {
		t.Error("a pod that opted out is captured")
	}
	// Broken YAML changes nothing, and neither does an object that is gone before its sandbox.
	n.write("shop.yaml", namespace("shop", "ambient")+"---\nkind: Pod\nmetadata: [")
	n.write("other.yaml", namespace("other", ""))
	n.add(newSandboxIn(t, n, "other", "x"))
	if !s.captured() {
		t.Error("released by broken YAML")
	}
}

func newSandboxIn(t *testing.T, n *node, namespace, name string) plugin.Event {
	t.Helper()
	n.write(namespace+"-"+name+".yaml", podYAML(namespace, name, "u-"+name, ""))
	return newSandbox(t).event(namespace, name, "u-"+name, "c-"+name)
}

func TestRestartKeepsPods(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", "")+podYAML("shop", "web-2", "u-2", ""))
	stop := n.start()
	z, _ := n.ztunnel()
	s, lost := newSandbox(t), newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	n.add(lost.event("shop", "web-2", "u-2", "c-2"))
	n.redirection("shop/web-2", "enabled")
	z.await(fmt.Sprintf("add u-2 shop/web-2 sa-web-2 %d", lost.id()))
	stop()
	if !s.captured() {
		t.Error("an agent that stops takes the rules with it")
	}
	if p := n.redirection("shop/web-1", "enabled"); p == nil {
		t.Error("an agent that stops takes the announcement with it")
	}
	lost.destroy()
	s.exec("iptables", "-t", "nat", "-F", "ISTIO_OUTPUT")

	stop = n.start()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	z.expect("synced [u-1]")
	n.redirection("shop/web-2", "gone")
	n.eventually("the rules are repaired", func() bool {
		code, _ := n.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1"))
		return code == http.StatusOK
	})
	stop()

	// The label goes while no agent runs.
	n.write("shop.yaml", namespace("shop", "")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	n.redirection("shop/web-1", "")
	n.eventually("the rules are gone", func() bool { return !strings.Contains(s.exec("iptables", "-t", "nat", "-S"), "ISTIO_") })
}

func TestANamespaceThatVanishesWithoutADel(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	z, _ := n.ztunnel()
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	s.destroy()
	z.await("del u-1")
	n.redirection("shop/web-1", "gone")
}

func TestAnnotationsOfARunningPod(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	write := func(annotation string) {
		n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", annotation))
	}
	write("")
	n.start()
	n.ztunnel()
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	nat := func(port string) func() bool {
		return func() bool { return strings.Contains(s.exec("iptables", "-t", "nat", "-S"), port) }
	}
	write("  annotations: {ambient.istio.io/dns-capture: 'true'}\n")
	n.eventually("DNS is captured", nat("15053"))
	write("  annotations: {ambient.istio.io/bypass-inbound-capture: 'true'}\n")
	n.eventually("inbound is no longer captured", func() bool { return !nat("15006")() && !nat("15053")() && nat("15001")() })
	write("")
	n.eventually("inbound is captured again", func() bool {
		if !nat("15006")() {
			return false
		}
		code, _ := n.ask(http.MethodPost, plugin.PathCheck, s.event("shop", "web-1", "u-1", "c-1"))
		return code == http.StatusOK // all of it: chains appear one by one
	})
	if !s.captured() {
		t.Error("not captured")
	}
}

func TestAPodOfTheSnapshotThatZtunnelRefusesIsOfferedAgain(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", ""))
	n.start()
	z, stop := n.ztunnel()
	z.expect("synced []")
	s := newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	stop()
	z2 := &ztunnel{t: t, events: make(chan string, 1000)}
	why := errors.New("not yet")
	z2.refuse.Store(&why)
	n.connect(z2)
	z2.await("refused u-1")
	z2.refuse.Store(nil)
	z2.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
}

func TestBrokenMemoryIsSetAside(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	path := filepath.Join(n.dir("run"), "pods.json")
	if err := os.WriteFile(path, []byte(`[{"Name":`), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	if _, err := os.Stat(path + ".bad"); err != nil {
		t.Error(err)
	}
}

func TestBrokenMemoryIsMadeUpFor(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	tree := newProcTree(t)
	n.config = func(c *cni.Config) { c.Node, c.ProcDir = "node-1", tree.dir }
	pods := podYAML("shop", "web-1", "u-1", "") + podYAML("shop", "web-2", "u-2", "")
	n.write("shop.yaml", namespace("shop", "ambient")+pods)
	stop := n.start()
	z, _ := n.ztunnel()
	s, other := newSandbox(t), newSandbox(t)
	for uid, box := range map[string]*sandbox{"u-1": s, "u-2": other} {
		box.sleeper()
		tree.process(100+int(uid[2]), 1, "0::/kubepods/pod"+uid+"/c\n", box.path())
	}
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	n.add(other.event("shop", "web-2", "u-2", "c-2"))
	n.redirection("shop/web-2", "enabled")
	stop()
	if err := os.WriteFile(filepath.Join(n.dir("run"), "pods.json"), nil, 0o600); err != nil { // a disk that was full
		t.Fatal(err)
	}
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", "")+
		podYAML("shop", "web-2", "u-2", "  labels: {istio.io/dataplane-mode: none}\n"))
	n.start()
	z.await("synced []")
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", s.id()))
	n.redirection("shop/web-2", "")
	n.eventually("the other is released", func() bool { return !strings.Contains(other.exec("iptables-save"), "ISTIO_") })
	n.redirection("shop/web-1", "enabled")
	if !s.captured() {
		t.Error("not captured")
	}
}

func TestGCEndsWhatIsNotValid(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("plain.yaml", podYAML("plain", "a", "u-a", "")+podYAML("plain", "b", "u-b", ""))
	n.start()
	n.add(newSandbox(t).event("plain", "a", "u-a", "c-a"))
	n.add(newSandbox(t).event("plain", "b", "u-b", "c-b"))
	valid := plugin.Valid{Attachments: []plugin.Attachment{{ContainerID: "c-b", IfName: "eth0"}}}
	if code, text := n.ask(http.MethodPost, plugin.PathGC, valid); code != http.StatusOK {
		t.Fatalf("gc = %d %s", code, text)
	}
	n.redirection("plain/a", "gone")
	n.redirection("plain/b", "")
}

func TestAPodThatComesAgainInANewSandbox(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "db-0", "u-1", ""))
	n.start()
	z, _ := n.ztunnel()
	z.expect("synced []")
	s1, s2, s3 := newSandbox(t), newSandbox(t), newSandbox(t)
	n.add(s1.event("shop", "db-0", "u-1", "c-1"))
	z.expect(fmt.Sprintf("add u-1 shop/db-0 sa-db-0 %d", s1.id()))
	n.add(s2.event("shop", "db-0", "u-1", "c-2"))
	z.expect("del u-1")
	z.expect(fmt.Sprintf("add u-1 shop/db-0 sa-db-0 %d", s2.id()))
	// The old sandbox ends late: the new one must not notice.
	n.ask(http.MethodPost, plugin.PathDel, s1.event("shop", "db-0", "u-1", "c-1"))
	if code, text := n.ask(http.MethodPost, plugin.PathCheck, s2.event("shop", "db-0", "u-1", "c-2")); code != http.StatusOK {
		t.Errorf("cmdcheck = %d %s", code, text)
	}
	// A new pod of the same name, as a StatefulSet makes.
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "db-0", "u-2", ""))
	n.add(s3.event("shop", "db-0", "u-2", "c-3"))
	z.expect("del u-1")
	z.expect(fmt.Sprintf("add u-2 shop/db-0 sa-db-0 %d", s3.id()))
}

func TestTwoAgentsDoNotShareARunDirectory(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	env, err := daemon.NewEnv("cni-agent", t.Output(), daemon.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	a, err := cni.New(cni.Config{ConfigDir: n.dir("config"), RunDir: n.dir("run"), ZDSSocket: n.dir("z2")}, env)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent answers there") {
		t.Errorf("Run = %v after %v, want an error about another agent", err, time.Since(began))
	}
	st, err := os.Stat(filepath.Join(n.dir("run"), plugin.SocketName))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v; want 0600", st.Mode(), err)
	}
}

func TestUninstallByHand(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.write("shop.yaml", namespace("shop", "ambient")+podYAML("shop", "web-1", "u-1", "")+podYAML("shop", "web-2", "u-2", ""))
	conf, bin := n.dir("conf"), n.dir("bin")
	const list = `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`
	for _, dir := range []string{conf, bin} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(conf, "10-k8s.conflist")
	entered, err := install.Insert([]byte(list), []byte(`{"type":"istio-cni"}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(path, entered, 0o600), os.WriteFile(filepath.Join(bin, "istio-cni"), nil, 0o755)); err != nil {
		t.Fatal(err)
	}
	stop := n.start()
	n.ztunnel()
	s, lost := newSandbox(t), newSandbox(t)
	n.add(s.event("shop", "web-1", "u-1", "c-1"))
	n.add(lost.event("shop", "web-2", "u-2", "c-2"))
	n.redirection("shop/web-1", "enabled")

	env, err := daemon.NewEnv("cni-agent", t.Output(), daemon.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := cni.Config{RunDir: n.dir("run"), StatusDir: n.dir("status"), CNIConfDir: conf, CNIBinDir: bin, Uninstall: true}
	if err := cni.Main(t.Context(), cfg, env); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("Main = %v while an agent runs, want an error that says to stop it", err)
	}
	if !s.captured() {
		t.Error("a pod was released under a running agent")
	}
	stop()
	lost.destroy()
	for range 2 {
		if err := cni.Main(t.Context(), cfg, env); err != nil {
			t.Errorf("Main = %v", err)
		}
	}
	if s.captured() {
		t.Error("rules are left in a running pod")
	}
	n.redirection("shop/web-1", "")
	if b, err := os.ReadFile(path); err != nil || string(b) != list {
		t.Errorf("conflist is %s, %v; want %s", b, err, list)
	}
	for _, dir := range []string{bin, n.dir("run")} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s holds %v, %v; want nothing", dir, left, err)
		}
	}
}
