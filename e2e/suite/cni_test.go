package suite_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mistnet/mistnet/e2e/lab"
)

const (
	confDir    = "/etc/cni/net.d"
	pluginPath = "/opt/cni/bin/istio-cni"
	agents     = "istio-cni-node"
	// mended is how long the agent may take to put right what others do to its files, on a machine that does much else.
	mended = 5 * time.Second
)

// TestCNIRepairs: what others do to the plugin's files is put right at once, and no pod of the mesh ever starts without it:
// the server of every step refuses plaintext.
func TestCNIRepairs(t *testing.T) {
	s := newSpace(t, "e2e-cni", true)
	s.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two})
	s.redirected(true)
	const url = "http://server/"
	newcomer := func(s *space, name string) {
		s.Helper()
		s.deploy(workload{name: name, node: one, init: []string{"get", url}})
	}
	newcomer(s, "before")
	list := strings.TrimSpace(s.node(one, "sh", "-c", "ls "+confDir+"/*.conflist | head -n 1"))

	t.Run("a configuration that another CNI overwrites", func(t *testing.T) {
		s := &space{t, s.name}
		s.write(one, list, s.foreign(one, list))
		s.within(mended, "the configuration has the plugin again", func() error { return s.extended(one, list) })
		newcomer(s, "overwritten")
	})

	t.Run("a configuration of another name that goes first", func(t *testing.T) {
		s := &space{t, s.name}
		first := confDir + "/00-e2e.conflist"
		t.Cleanup(func() { _, _ = one.Exec(s.background(), "rm", "-f", first) })
		s.write(one, first, s.foreign(one, list))
		s.within(mended, "the new configuration has the plugin", func() error { return s.extended(one, first) })
		newcomer(s, "renamed")
	})

	t.Run("a deleted plugin", func(t *testing.T) {
		s := &space{t, s.name}
		s.node(one, "rm", pluginPath)
		s.within(mended, "the plugin is there again", func() error { _, err := one.Exec(t.Context(), "test", "-x", pluginPath); return err })
		newcomer(s, "deleted")
	})

	t.Run("an agent killed while a pod waits for it", func(t *testing.T) {
		s := &space{t, s.name}
		agent := strings.TrimSpace(s.node(one, "pgrep", "-o", "-x", "cni-agent"))
		s.node(one, "kill", "-STOP", agent)
		t.Cleanup(func() { _, _ = one.Exec(s.background(), "kill", "-CONT", agent) })
		s.must(cluster.Apply(t.Context(), fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: survivor, namespace: %s}, spec: {
			nodeName: %s, terminationGracePeriodSeconds: 1, initContainers: [{name: init, image: %q, args: [get, %q]}],
			containers: [{name: app, image: %[3]q, args: [serve]}]}}`, s.name, one.Name, lab.AppImage, url)))
		s.eventually("the plugin waits for the agent", func() error { _, err := one.Exec(t.Context(), "pgrep", "-x", "istio-cni"); return err })
		s.node(one, "kill", "-KILL", agent)
		s.ready("survivor")
		s.get("survivor", url)
	})

	t.Run("a full disk under the plugin's log", func(t *testing.T) {
		s := &space{t, s.name}
		const log, small = "/var/run/istio-cni/istio-cni.log", "/run/e2e-full"
		t.Cleanup(func() {
			_, _ = one.Exec(s.background(), "sh", "-c", "umount "+log+"; umount "+small+"; rmdir "+small)
		})
		s.node(one, "sh", "-c", "touch "+log+" && mkdir -p "+small+" && mount -t tmpfs -o size=64k none "+small+
			" && touch "+small+"/log && { cat /dev/zero > "+small+"/filler; mount --bind "+small+"/log "+log+"; }")
		if out, err := one.Exec(t.Context(), "sh", "-c", "echo more >> "+log); err == nil {
			t.Fatalf("the disk is not full: %s", out)
		}
		newcomer(s, "unlogged")
	})
	s.undisturbed()
}

// TestCNITaint: with the setting a node whose agent is not ready takes no pods, and takes them again when it is.
func TestCNITaint(t *testing.T) {
	s := newSpace(t, "e2e-taint", false)
	one := cluster.Node(1)
	const key = "cni.istio.io/not-ready"
	tainted := func(want bool) func() error {
		return func() error {
			n, err := cluster.Client().CoreV1().Nodes().Get(s.Context(), one.Name, metav1.GetOptions{})
			if err == nil && slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key }) != want {
				err = fmt.Errorf("taints of %s are %v", one.Name, n.Spec.Taints)
			}
			return err
		}
	}
	role, err := cluster.Client().RbacV1().ClusterRoles().Get(t.Context(), "istio-cni", metav1.GetOptions{})
	s.must(err)
	ds, err := cluster.Client().AppsV1().DaemonSets("istio-system").Get(t.Context(), agents, metav1.GetOptions{})
	s.must(err)
	args := ds.Spec.Template.Spec.Containers[0].Args
	t.Cleanup(func() {
		s := &space{t, s.name}
		s.patch("clusterrole", "istio-cni", map[string]any{"rules": role.Rules})
		s.arguments(args)
		for _, n := range cluster.Nodes {
			_, _ = cluster.Kubectl(s.background(), "taint", "node", n.Name, key+"-")
		}
	})
	s.patch("clusterrole", "istio-cni", map[string]any{"rules": append(slices.Clone(role.Rules),
		rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes"}, Verbs: []string{"get", "patch"}})})
	s.arguments(append(slices.Clone(args), "-untaint="+key, "-taint"))
	s.eventually("a node that is ready has no taint", tainted(false))

	aside := "/run/e2e-net.d"
	s.node(one, "sh", "-c", "mkdir -p "+aside+" && mv "+confDir+"/*.conflist "+aside)
	back := func() {
		_, _ = one.Exec(s.background(), "sh", "-c", "mv "+aside+"/*.conflist "+confDir+"; rmdir "+aside)
	}
	t.Cleanup(back)
	s.eventually("a node without a network is tainted", tainted(true))
	back()
	s.eventually("the taint goes with its reason", tainted(false))
	s.must(one.WaitReady(t.Context()))
}

// TestCNILeaves: an agent whose DaemonSet is deleted leaves nothing on its node, pods go on without the mesh, and join again
// with the next one.
func TestCNILeaves(t *testing.T) {
	s := newSpace(t, "e2e-leave", true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "client", node: one})
	s.redirected(true)
	s.reach("client", "http://server/")
	if !strings.Contains(s.traces(one), "15001") {
		t.Fatal("no rules are seen in pods: the test is blind")
	}

	ds, err := cluster.Client().AppsV1().DaemonSets("istio-system").Get(t.Context(), agents, metav1.GetOptions{})
	s.must(err)
	ds.ObjectMeta = metav1.ObjectMeta{Name: ds.Name, Namespace: ds.Namespace, Labels: ds.Labels, Annotations: ds.Annotations}
	restore := func() {
		_, err := cluster.Client().AppsV1().DaemonSets("istio-system").Create(s.background(), ds, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) {
			s.must(err)
		}
		_, err = cluster.Kubectl(s.background(), "-n", "istio-system", "rollout", "status", "daemonset", agents, "--timeout=2m")
		s.must(err)
	}
	t.Cleanup(restore)
	_, err = cluster.Kubectl(t.Context(), "-n", "istio-system", "delete", "daemonset", agents, "--wait=true", "--cascade=foreground")
	s.must(err)
	s.redirected(false)
	for _, n := range []*lab.Node{one, two} {
		s.eventually(n.Name+" holds nothing of the mesh", func() error {
			if left := s.traces(n); left != "" {
				return errors.New(left)
			}
			return nil
		})
	}
	s.get("client", "http://server/")
	s.deploy(workload{name: "plain", node: one})
	s.reach("plain", "http://server/")

	restore()
	s.redirected(true) // the plain one, too: it runs
	s.get("plain", "http://server/")
	s.undisturbed()
}

// traces lists what the agent put on a node: files, rules in the namespaces of pods and in the node's own, sets.
func (s *space) traces(n *lab.Node) string {
	s.Helper()
	return s.node(n, "sh", "-c", `
		ls /opt/cni/bin/istio-cni 2>/dev/null
		grep -l istio-cni /etc/cni/net.d/* 2>/dev/null
		ls /var/run/istio-cni/* 2>/dev/null
		look() { "$@" iptables-save; "$@" ip6tables-save; "$@" nft list ruleset inet; "$@" ip rule; "$@" ipset list -n; }
		{ look; for f in /var/run/netns/*; do look nsenter --net=$f; done; } 2>/dev/null | grep -E 'ISTIO|istio|1500[0-9]|0x111'
		true`)
}

// node runs a command on a node.
func (s *space) node(n *lab.Node, args ...string) string {
	s.Helper()
	out, err := n.Exec(s.Context(), args...)
	s.must(err)
	return out
}

// write replaces a file of a node at once.
func (s *space) write(n *lab.Node, path, content string) {
	s.Helper()
	s.node(n, "sh", "-c", `printf %s "$1" > "$2.tmp" && mv "$2.tmp" "$2"`, "sh", content, path)
}

// foreign is a network configuration as its owner writes it, without our plugin.
func (s *space) foreign(n *lab.Node, path string) string {
	s.Helper()
	var conf map[string]any
	s.must(json.Unmarshal([]byte(s.node(n, "cat", path)), &conf))
	plugins, _ := conf["plugins"].([]any)
	conf["plugins"] = slices.DeleteFunc(plugins, func(p any) bool { m, _ := p.(map[string]any); return m["type"] == "istio-cni" })
	b, err := json.Marshal(conf)
	s.must(err)
	return string(b)
}

// extended is an error when a configuration lacks our plugin.
func (s *space) extended(n *lab.Node, path string) error {
	b, err := n.Exec(s.Context(), "cat", path)
	if err == nil && !strings.Contains(b, `"istio-cni"`) {
		err = fmt.Errorf("%s is %s", path, b)
	}
	return err
}

// patch merges fields into an object of the cluster.
func (s *space) patch(kind, name string, fields any) {
	s.Helper()
	b, err := json.Marshal(fields)
	s.must(err)
	_, err = cluster.Kubectl(s.background(), "patch", kind, name, "--type=merge", "-p", string(b))
	s.must(err)
}

// arguments gives the agents others, and waits until they run with them.
func (s *space) arguments(args []string) {
	s.Helper()
	b, err := json.Marshal([]map[string]any{{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": args}})
	s.must(err)
	_, err = cluster.Client().AppsV1().DaemonSets("istio-system").Patch(s.background(), agents, types.JSONPatchType, b, metav1.PatchOptions{})
	s.must(err)
	_, err = cluster.Kubectl(s.background(), "-n", "istio-system", "rollout", "status", "daemonset", agents, "--timeout=3m")
	s.must(err)
}

// background is for what must be done though the test has ended.
func (s *space) background() context.Context { return context.WithoutCancel(s.Context()) }
