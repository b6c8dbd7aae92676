package suite_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/mistnet/mistnet/e2e/lab"
)

// TestUninstall: a mesh goes without a trace while pods are in it, and they talk on. It has a cluster of its own, for the
// suite's must keep its mesh. MISTNET_E2E_UNINSTALL names a lab without a mesh that is used instead: for people who write
// tests; the mesh is installed there afterwards.
func TestUninstall(t *testing.T) {
	if cluster == nil {
		t.Skip("runs in a Kubernetes cluster: set MISTNET_E2E=1, as root (make e2e does)")
	}
	dir, err := built()
	if err != nil {
		t.Fatal(err)
	}
	bare(t)
	ctl := filepath.Join(dir, "mistctl")
	s := newSpace(t, "e2e-uninstall", false)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "server", node: two}, workload{name: "client", node: one})
	s.deploy(workload{name: "loader", node: one, args: []string{"load", "http://server/", "10"}})
	_, failedBefore := s.load("loader")
	before := s.picture()
	if len(before) < 100 {
		t.Fatalf("the picture of the cluster has only %d parts", len(before))
	}
	mistctl := func(s *space, args ...string) string {
		s.Helper()
		out, err := cluster.Command(s.Context(), slices.Concat([]string{ctl}, args, []string{"--timeout", "5m"})...).CombinedOutput()
		if err != nil {
			s.Fatalf("mistctl %q: %v\n%s", args, err, out)
		}
		s.Logf("mistctl %q\n%s", args, out)
		return string(out)
	}
	inMesh := func(s *space, words string) {
		s.Helper()
		s.redirected(true)
		s.eventually("traffic goes through tunnels", func() error {
			wire := s.capture()
			s.get("client", "http://server/?"+words)
			if err := wire.Stop(); err != nil {
				return err
			}
			if wire.Contains([]byte(words)) {
				return errors.New("it is in the clear")
			}
			return nil
		})
	}
	plain := func(s *space, words string) {
		s.Helper()
		wire := s.capture()
		s.get("client", "http://server/?"+words)
		s.must(wire.Stop())
		if !wire.Contains([]byte(words)) {
			s.Error("without a mesh, traffic is not in the clear")
		}
		s.load("loader") // goes on
	}

	steps := []struct {
		name string
		run  func(s *space)
	}{
		{"an install at the same time is refused, one that died can be run again", func(s *space) {
			var said bytes.Buffer
			first := cluster.Command(s.Context(), ctl, "install", "--timeout", "5m")
			first.Stdout, first.Stderr = &said, &said
			s.must(first.Start())
			defer func() { _ = first.Process.Kill(); _ = first.Wait() }()
			s.eventually("the first install is half-way", func() error {
				_, err := cluster.Client().AppsV1().Deployments(system).Get(s.Context(), "istiod", metav1.GetOptions{})
				return err
			})
			out, err := cluster.Command(s.Context(), ctl, "install", "--timeout", "5m").CombinedOutput()
			if err == nil || !strings.Contains(string(out), "another mistctl is at work") {
				s.Errorf("a second install at the same time: %v\n%s", err, out)
			}
			s.must(first.Process.Kill())
			var exit *exec.ExitError
			if err := first.Wait(); !errors.As(err, &exit) || exit.Exited() {
				s.Fatalf("the first install was to be killed: %v\n%s", err, &said)
			}
			s.eventually("the lock of a dead one comes free", func() error {
				out, err := cluster.Command(s.Context(), ctl, "install", "--timeout", "5m").CombinedOutput()
				if err == nil {
					return nil
				}
				if !strings.Contains(string(out), "another mistctl is at work") {
					s.Fatalf("install again: %v\n%s", err, out)
				}
				return fmt.Errorf("%w: %s", err, out)
			})
		}},
		{"uninstall keeps definitions, objects of users and the authority's key", func(s *space) {
			s.label(true)
			inMesh(s, "first-mesh")
			s.policy("AuthorizationPolicy", "kept", "\n  action: DENY\n  rules: [{from: [{source: {principals: [cluster.local/ns/e2e-uninstall/sa/nobody]}}]}]")
			s.condition("kept", "True", "Accepted")
			key := s.secret()
			mistctl(s, "uninstall")
			plain(s, "first-plain")
			s.left(before, func(what string) bool {
				for _, kept := range []string{
					"customresourcedefinitions.apiextensions.k8s.io /", "apiservices.apiregistration.k8s.io /", "authorizationpolicies.security.istio.io " + s.name + "/kept",
					"secrets " + system + "/istio-ca-secret", "namespaces /" + system, "serviceaccounts " + system + "/default", "configmaps " + system + "/kube-root-ca.crt",
				} {
					if strings.HasPrefix(what, kept) {
						return true
					}
				}
				return false
			})
			if !bytes.Equal(s.secret(), key) {
				s.Error("the authority's key is another")
			}
			mistctl(s, "install")
			inMesh(s, "second-mesh")
			if !bytes.Equal(s.secret(), key) {
				s.Error("another authority certifies after the second install")
			}
			s.condition("kept", "True", "Accepted")
		}},
		{"uninstall --purge leaves what there was before", func(s *space) {
			mistctl(s, "uninstall", "--purge")
			plain(s, "second-plain")
			s.left(before, func(string) bool { return false })
		}},
		{"install again", func(s *space) {
			mistctl(s, "install")
			inMesh(s, "third-mesh")
		}},
	}
	for _, step := range steps {
		if !t.Run(step.name, func(t *testing.T) { step.run(&space{t, s.name}) }) {
			return // later ones go by it
		}
	}
	s.undisturbed()
	if sent, failed := s.load("loader"); failed > failedBefore {
		logs, _ := cluster.Kubectl(t.Context(), "-n", s.name, "logs", "loader", "--timestamps")
		t.Errorf("%d of %d requests failed:\n%s", failed-failedBefore, sent, complaints(logs))
	}
}

// bare makes the suite's cluster one without a mesh, with its images, until the test ends.
func bare(t *testing.T) {
	t.Helper()
	shared := cluster
	if name := os.Getenv("MISTNET_E2E_UNINSTALL"); name != "" {
		l, err := lab.Open("", name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cluster = shared; _ = l.CloseHandle() })
		cluster = l
	} else {
		l, err := lab.Start(t.Context(), lab.FromEnv())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Log(state(context.Background()))
			}
			cluster = shared
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if left, err := lab.Leftovers("", l.Name()); err != nil || len(left) > 0 {
				t.Errorf("the lab left behind: %q, %v", left, err)
			}
		})
		cluster = l
	}
	_, err := cluster.Client().CoreV1().Namespaces().Get(t.Context(), system, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		t.Fatalf("lab %s has a namespace %s, or cannot say: %v", cluster.Name(), system, err)
	}
	if err := loadBuilt(t.Context(), cluster); err != nil {
		t.Fatal(err)
	}
}

// secret is the key of istiod's own authority.
func (s *space) secret() []byte {
	s.Helper()
	secret, err := cluster.Client().CoreV1().Secrets(system).Get(s.Context(), "istio-ca-secret", metav1.GetOptions{})
	s.must(err)
	key := secret.Data["ca-key.pem"]
	if len(key) == 0 {
		s.Fatal("istio-ca-secret has no key")
	}
	return key
}

// left waits until the cluster is what it was, but for additions that are meant to stay; the namespace's label is its
// user's. What the control plane and kube-proxy clear up takes them a moment.
func (s *space) left(before map[string]string, stays func(what string) bool) {
	s.Helper()
	s.label(false)
	defer s.label(true)
	s.eventually("the cluster is what it was", func() error {
		now := s.picture()
		maps.DeleteFunc(now, func(what, _ string) bool { _, was := before[what]; return !was && stays(what) })
		if diff := cmp.Diff(before, now); diff != "" {
			return fmt.Errorf("it is not, -before +now:\n%s", diff)
		}
		return nil
	})
}

// hostLook prints what a node holds that the mesh could change. What pods and connections change by themselves is left out:
// interfaces of pods, counters, the runtime's own directories.
const hostLook = `
part() { echo "== $1"; }
net() {
	part "$1 iptables"; iptables-save | grep -v '^#' | sed 's/\[[0-9:]*\]//'
	part "$1 ip6tables"; ip6tables-save | grep -v '^#' | sed 's/\[[0-9:]*\]//'
	part "$1 nftables"; nft -s list ruleset
	part "$1 rules"; ip rule; ip -6 rule
	part "$1 routes"; { ip route show table all; ip -6 route show table all; } | grep -v ' dev veth' | sed 's/ expires [0-9]*sec//' | sort -u
	part "$1 sockets"; awk '$4 == "0A" { print $2 }' /proc/self/net/tcp /proc/self/net/tcp6 | sort -u
	part "$1 settings"; grep -s . /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/{all,default,lo,eth0,cni0}/{rp_filter,route_localnet,accept_local,src_valid_mark,forwarding,send_redirects} || true
}
net host
part files; find /etc/cni /opt/cni -type f -exec sha256sum {} + | sort -k 2
part run; find /run/ -xdev \( -path '/run/containerd' -o -path '/run/netns/cni-*' -o -path '/run/lock' -o -path '/run/runc' -o -name '*.pid' \) -prune -o -printf '%p %y %m\n' | sort
`

// podLook is hostLook for the pod of an application.
const podLook = `
for p in $(pgrep -x app); do
	grep -q kubepods /proc/$p/cgroup && tr '\0' ' ' < /proc/$p/cmdline | grep -qE 'app (serve|load)' || continue
	[ "$(nsenter -t $p -u hostname)" = "$POD" ] || continue
	exec nsenter -t $p -n bash -c "$LOOK"
done
echo "no process of pod $POD" >&2; exit 1
`

// ofKubelet are paths that the kubelet makes on a node for mounts of the agent and never removes: two directories, empty
// afterwards, and iptables' lock. They are in memory, and gone with the next start of the node.
var ofKubelet = strings.NewReplacer("/run/istio-cni d 755\n", "", "/run/ztunnel d 755\n", "", "/run/xtables.lock f 644\n", "")

// staleChain is one of kube-proxy's in nftables, empty since its service went, until kube-proxy sweeps.
var staleChain = regexp.MustCompile(`\n\n\tchain (service|endpoint|external|firewall)-\S+ \{\n\t\}`)

// picture is what a cluster is made of, by name: what the mesh could change of its nodes, pods and objects.
func (s *space) picture() map[string]string {
	s.Helper()
	all := map[string]string{}
	parts := func(where, text string) {
		for part := range strings.SplitSeq(text, "== ") {
			if name, body, ok := strings.Cut(part, "\n"); ok {
				all[where+" "+name] = staleChain.ReplaceAllString(ofKubelet.Replace(body), "")
			}
		}
	}
	for _, n := range cluster.Nodes {
		out, err := n.Exec(s.Context(), "bash", "-c", hostLook)
		s.must(err)
		parts(n.Name, out)
	}
	inPod, _, _ := strings.Cut(hostLook, "\nnet host")
	for _, p := range s.pods() {
		for _, n := range cluster.Nodes {
			if n.Name != p.Spec.NodeName {
				continue
			}
			out, err := n.Exec(s.Context(), "env", "POD="+p.Name, "LOOK="+inPod+"\nnet pod", "bash", "-c", podLook)
			s.must(err)
			parts(p.Name, out)
		}
	}
	maps.Copy(all, s.objects())
	return all
}

// objects are the names of all objects of all kinds, with labels and annotations of those the mesh puts some on.
func (s *space) objects() map[string]string {
	s.Helper()
	disco, err := discovery.NewDiscoveryClientForConfig(cluster.RESTConfig())
	s.must(err)
	var lists []*metav1.APIResourceList
	s.eventually("the API server tells its kinds", func() (err error) { lists, err = disco.ServerPreferredResources(); return err })
	config := cluster.RESTConfig()
	config.WarningHandler = rest.NoWarnings{} // of kinds that are deprecated
	client, err := dynamic.NewForConfig(config)
	s.must(err)
	marked := []string{"namespaces", "nodes", "pods", "services"}
	all := map[string]string{}
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		s.must(err)
		for _, r := range l.APIResources {
			if r.Name == "events" || r.Name == "componentstatuses" || !slices.Contains(r.Verbs, "list") {
				continue
			}
			kind := gv.WithResource(r.Name)
			items, err := client.Resource(kind).List(s.Context(), metav1.ListOptions{})
			if apierrors.IsNotFound(err) || apierrors.IsMethodNotSupported(err) {
				continue // a definition that has just gone
			}
			s.must(err)
			for _, u := range items.Items {
				body := ""
				if gv.Group == "" && slices.Contains(marked, r.Name) {
					body = fmt.Sprint(u.GetLabels(), u.GetAnnotations(), u.GetFinalizers())
				}
				all[kind.GroupResource().String()+" "+u.GetNamespace()+"/"+u.GetName()] = body
			}
		}
	}
	return all
}
