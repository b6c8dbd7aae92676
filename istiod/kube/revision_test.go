package kube_test

import (
	"context"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

// labelled gives an object of configuration, or a Gateway, a revision.
func labelled(u *unstructured.Unstructured, revision string) *unstructured.Unstructured {
	u.SetLabels(map[string]string{"istio.io/rev": revision})
	return u
}

// run runs another source on the same API server until the test ends.
func (c *cluster) run(revision string) *kube.Source {
	s := kube.New(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Identity: "of " + revision, Revision: revision,
		Waypoints: gateway.Config{Image: "waypoint:1"}})
	s.WriteRoot([]byte("ROOT"))
	x := index.New(translate.Config{})
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(events []index.Event) { s.Tell(x.Apply(events...)) }) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Errorf("Run = %v", err)
		}
	})
	return s
}

// runBy is the revision of the istiod that the pods of a waypoint ask; "" while there are none.
func (c *cluster) runBy(namespace, name string) string {
	d := c.get(deployments, namespace, name)
	if d == nil {
		return ""
	}
	rev, _, _ := unstructured.NestedString(d.Object, "spec", "template", "metadata", "annotations", "istio.io/rev")
	return rev
}

// TestRevisionsShareACluster: a Gateway is made a waypoint by the revision that its label, or else its namespace's, names, by its
// name or a tag; what has no label is the default one's. Each leads for itself, and neither touches what is the other's.
func TestRevisionsShareACluster(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("istio-system", nil), namespace("shop", nil), namespace("moved", map[string]string{"istio.io/rev": "blue"}),
		waypointGateway("shop", "plain", nil), labelled(waypointGateway("shop", "own", nil), "blue"),
		waypointGateway("moved", "inherits", nil), labelled(waypointGateway("moved", "back", nil), "default"),
		labelled(waypointGateway("moved", "empty", nil), ""), labelled(waypointGateway("shop", "tagged", nil), "prod"))
	written := c.appliers()
	first, blue := c.run("default"), c.run("blue")
	until := func(what string, want map[string]string) {
		t.Helper()
		got := make(map[string]string)
		c.eventually(what, func(context.Context) bool {
			for name := range want {
				ns, name, _ := strings.Cut(name, "/")
				got[ns+"/"+name] = c.runBy(ns, name)
			}
			return fmt.Sprint(got) == fmt.Sprint(want)
		})
	}
	until("every Gateway is run by its revision", map[string]string{"shop/plain": "default", "shop/own": "blue", "moved/inherits": "blue",
		"moved/back": "default", "moved/empty": "default", "shop/tagged": ""})
	if !first.Leads() || !blue.Leads() {
		t.Errorf("leads: default %v, blue %v, want both", first.Leads(), blue.Leads())
	}
	for name, s := range map[string]*kube.Source{"default": first, "blue": blue} {
		c.eventually("what is left to others is named by "+name, func(context.Context) bool {
			return slices.ContainsFunc(s.Problems(), func(p kube.Problem) bool {
				return p.Name.String() == "shop/tagged" && p.InForce && strings.Contains(p.Reason, "revision prod (its label istio.io/rev)") &&
					strings.HasSuffix(p.Reason, "this istiod is revision "+name)
			})
		})
	}
	if n := written(); n["gateways/status shop/tagged"] != 0 {
		t.Errorf("writes = %v, want no status of a Gateway that nobody runs", n)
	}

	tag := service("istio-system", "istiod-revision-tag-prod", "10.96.0.3")
	tag.Labels = map[string]string{"istio.io/rev": "blue", "istio.io/tag": "prod"}
	if _, err := c.kube.CoreV1().Services("istio-system").Create(t.Context(), tag, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	until("a tag stands for a revision", map[string]string{"shop/tagged": "blue"})
	shop := namespace("shop", map[string]string{"istio.io/rev": "prod"})
	if _, err := c.kube.CoreV1().Namespaces().Update(t.Context(), shop, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	until("a namespace moves", map[string]string{"shop/plain": "blue", "shop/own": "blue", "moved/back": "default"})

	// When everything has settled, each was written once, and what moved a few times after that, for what two revisions hear of a namespace
	// comes in any order: nobody wrote over another's again and again.
	all := []string{"shop/plain", "shop/own", "shop/tagged", "moved/inherits", "moved/back", "moved/empty"}
	for _, key := range all {
		ns, name, _ := strings.Cut(key, "/")
		c.eventually(key+" serves", func(context.Context) bool {
			c.available(ns, name, 1) // again: the pretended API server may lose it to a write at the same time
			return c.condition(ns, name, "Programmed") == "True Programmed"
		})
	}
	n := written()
	for _, key := range all {
		most := map[bool]int{true: 6, false: 1}[key == "shop/plain"]
		kind := map[bool]string{true: "services ", false: "deployments "}[key == "shop/plain"] // its Deployment this test writes as well, while it moves
		if n[kind+key] > most || n["gatewayclasses/status istio-waypoint"] > 2 {
			t.Errorf("writes = %v, want at most %d of what is of %s, and of the class one by each", n, most, key)
		}
	}
}

// TestConfigurationOfAnotherRevision: an object with the label of another revision has no effect, and is named; its namespace does
// not matter.
func TestConfigurationOfAnotherRevision(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", map[string]string{"istio.io/rev": "green"}), labelled(allow("shop", "ours", "shop"), "blue"),
		labelled(allow("shop", "theirs", "shop"), "green"), allow("shop", "all", "shop"))
	c.startWith(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Revision: "blue"})
	there := func(names ...string) func(translate.Nouns) bool {
		return func(n translate.Nouns) bool {
			for _, name := range []string{"ours", "theirs", "all"} {
				if (n.Policies["shop/"+name] != nil) != slices.Contains(names, name) {
					return false
				}
			}
			return true
		}
	}
	c.until("those of this revision and of all", there("ours", "all"))
	if p := c.source.Problems(); len(p) != 1 || p[0].Name.Name != "theirs" || p[0].Resource != "authorizationpolicies" ||
		!strings.Contains(p[0].Reason, `says "green", and this istiod is revision blue`) {
		t.Errorf("problems = %+v, want the policy of the other revision", p)
	}
	if _, err := c.dynamic.Resource(policies).Namespace("shop").Update(t.Context(), labelled(allow("shop", "theirs", "shop"), "blue"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("one that comes over", there("ours", "all", "theirs"))
	if p := c.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %+v, want none", p)
	}
}

// TestRootsOfSeveralRevisions: another than the default one writes the root certificate where there is none, or where the namespace is
// its own and has others; the same certificates written another way are left alone.
func TestRootsOfSeveralRevisions(t *testing.T) {
	t.Parallel()
	block := func(text string) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(text)}))
	}
	have := func(namespace, text string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "istio-ca-root-cert"}, Data: map[string]string{"root-cert.pem": text}}
	}
	own := map[string]string{"istio.io/rev": "blue"}
	c := newCluster(t, namespace("theirs", nil), namespace("ours", own), namespace("same", own), namespace("zbare", nil),
		have("theirs", block("x")), have("ours", block("x")), have("same", "# of Istio\n\n"+block("b")+"\n"+block("a")+"\n"))
	s := kube.New(kube.Config{Clients: kube.Clients{Kube: c.kube, Dynamic: c.dynamic}, Revision: "blue"})
	s.WriteRoot([]byte(block("a") + block("b")))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func([]index.Event) {}) }()
	defer func() { cancel(); <-done }()
	root := func(namespace string) string {
		cm, err := c.kube.CoreV1().ConfigMaps(namespace).Get(t.Context(), "istio-ca-root-cert", metav1.GetOptions{})
		if err != nil {
			return ""
		}
		return cm.Data["root-cert.pem"]
	}
	for _, ns := range []string{"ours", "zbare"} {
		c.eventually("the root certificate is in "+ns, func(context.Context) bool { return root(ns) == block("a")+block("b") })
	}
	moved := namespace("theirs", own)
	before := root("theirs")
	if _, err := c.kube.CoreV1().Namespaces().Update(t.Context(), moved, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("a namespace that comes over gets it", func(context.Context) bool { return root("theirs") == block("a")+block("b") })
	if same := root("same"); before != block("x") || !strings.HasPrefix(same, "# of Istio") {
		t.Errorf("written over: another's namespace has %q, one with the same certificates %q", before, same)
	}
}
