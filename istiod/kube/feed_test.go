package kube_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

// absent makes the API server not know the kinds of security.istio.io while it is true.
func (c *cluster) absent() *atomic.Bool {
	var off atomic.Bool
	refuse := func(a clienttesting.Action) error {
		if off.Load() {
			return apierrors.NewNotFound(a.GetResource().GroupResource(), "")
		}
		return nil
	}
	c.dynamic.PrependReactor("list", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		err := refuse(a)
		return err != nil, nil, err
	})
	c.dynamic.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		err := refuse(a)
		return err != nil, nil, err
	})
	return &off
}

// TestKindsMayComeLater: without Istio's CRDs the mesh works, and with them their objects count, without a restart.
func TestKindsMayComeLater(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", nil), pod("shop", "web", "10.0.0.1"), allow("shop", "guard", "shop"))
	off := c.absent()
	off.Store(true)
	c.start()
	if got, want := c.names(), "Kubernetes//Pod/shop/web"; got != want {
		t.Fatalf("without CRDs there is %q, want %q", got, want)
	}
	off.Store(false)
	c.until("guard comes", func(n translate.Nouns) bool { return n.Policies["shop/guard"] != nil })
}

func TestDiscoverySelectors(t *testing.T) {
	t.Parallel()
	config := func(mesh string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": mesh}}
	}
	const some = "discoverySelectors:\n- matchLabels: {mesh: \"yes\"}\n"
	in := map[string]string{"mesh": "yes"}
	c := newCluster(t, namespace("in", in), namespace("out", nil), pod("in", "a", "10.0.0.1"), pod("out", "b", "10.0.0.2"),
		service("out", "b", "10.96.0.2"), allow("istio-system", "guard", "shop"), config(some))
	c.start()
	there := func(names ...string) func(translate.Nouns) bool {
		return func(n translate.Nouns) bool {
			for _, ns := range []string{"in/a", "out/b", "new/c"} {
				want := false
				for _, name := range names {
					want = want || name == ns
				}
				if (n.Workloads["Kubernetes//Pod/"+ns] != nil) != want {
					return false
				}
			}
			return n.Policies["istio-system/guard"] != nil
		}
	}
	c.until("only what is selected", there("in/a"))
	ctx := t.Context()
	update := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := c.kube.CoreV1().Namespaces().Update(ctx, namespace("out", in), metav1.UpdateOptions{})
	update(err)
	c.until("a label lets a namespace in", there("in/a", "out/b"))
	_, err = c.kube.CoreV1().Namespaces().Update(ctx, namespace("in", nil), metav1.UpdateOptions{})
	update(err)
	c.until("and another out", there("out/b"))
	_, err = c.kube.CoreV1().ConfigMaps("istio-system").Update(ctx, config("{}"), metav1.UpdateOptions{})
	update(err)
	c.until("without selectors all are known", there("in/a", "out/b"))
	_, err = c.kube.CoreV1().Pods("new").Create(ctx, pod("new", "c", "10.0.0.3"), metav1.CreateOptions{})
	update(err)
	c.until("a pod of a namespace not seen yet", there("in/a", "out/b", "new/c"))
	_, err = c.kube.CoreV1().ConfigMaps("istio-system").Update(ctx, config(some), metav1.UpdateOptions{})
	update(err)
	c.until("with selectors again only some are", there("out/b"))
	_, err = c.kube.CoreV1().Namespaces().Create(ctx, namespace("new", in), metav1.CreateOptions{})
	update(err)
	c.until("what was not kept is read again", there("out/b", "new/c"))
	_, err = c.kube.CoreV1().ConfigMaps("istio-system").Update(ctx, config("discoverySelectors: 7"), metav1.UpdateOptions{})
	update(err)
	update(c.kube.CoreV1().Pods("new").Delete(ctx, "c", metav1.DeleteOptions{}))
	c.until("nonsense leaves the selectors as they were", there("out/b"))
}

// TestMeshConfigWhileRunning: what istiod itself makes of the mesh's configuration follows its ConfigMap, an edit that makes no sense
// changes nothing and is named, and without a ConfigMap the flags hold again.
func TestMeshConfigWhileRunning(t *testing.T) {
	t.Parallel()
	ask := service("shop", "asks", "10.96.0.2")
	ask.Labels = map[string]string{"istio.io/use-waypoint": "gone"}
	c := newCluster(t, namespace("shop", nil), service("shop", "cart", "10.96.0.1"), ask,
		networking("VirtualService", "shop", "split", map[string]any{"hosts": []any{"cart"},
			"http": []any{map[string]any{"route": []any{map[string]any{"destination": map[string]any{"host": "cart"}}}}}}))
	c.start()
	holds := func(clients string, attempts uint32, closed bool) func(translate.Nouns) bool {
		return func(n translate.Nouns) bool {
			svc := n.Services["shop/asks.shop.svc.cluster.local"]
			if svc == nil || svc.Waypoint.IsZero() == closed || len(n.Routes) != 1 {
				return false
			}
			for _, r := range n.Routes {
				if len(r.Parents) != 1 || r.Parents[0].Clients != clients || (r.HTTP.Retry == nil) != (attempts == 0) ||
					attempts > 0 && r.HTTP.Retry.Attempts != attempts {
					return false
				}
			}
			return true
		}
	}
	c.until("what holds by itself", holds("", 0, false))
	cms := c.kube.CoreV1().ConfigMaps("istio-system")
	config := func(mesh string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": mesh}}
	}
	if _, err := cms.Create(t.Context(), config("defaultHttpRetryPolicy: {attempts: 5}\ndefaultVirtualServiceExportTo: [.]\nmistnet: {waypointUnavailable: deny}\n"+
		"trustDomain: elsewhere\nenableTracing: true"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("all of a new ConfigMap", holds("shop", 5, true))
	c.until("what of it does not hold is named", func(n translate.Nouns) bool {
		s := n.Statuses["ConfigMap istio-system/istio"]
		return s != nil && s.Message == "trustDomain: it is cluster.local until istiod is started anew; fields of mesh without effect: enableTracing"
	})
	for _, broken := range []string{"defaultHttpRetryPolicy: {attempts: many}", "mistnet: {waypointUnavailable: perhaps}", "pathNormalization: {normalization: SOME}", "{"} {
		if _, err := cms.Update(t.Context(), config(broken), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		field, _, _ := strings.Cut(broken, ":")
		c.eventually(broken+" is named", func(context.Context) bool {
			p := c.source.Problems()
			return len(p) == 1 && p[0].Resource == "configmaps/istio" && !p[0].InForce && (field == "{" || strings.Contains(p[0].Reason, field))
		})
	}
	c.until("the last good form", holds("shop", 5, true))
	if _, err := cms.Update(t.Context(), config("defaultHttpRetryPolicy: {attempts: 2}"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("a new one", holds("", 2, false))
	if p := c.source.Problems(); len(p) != 0 {
		t.Errorf("problems = %+v, want none", p)
	}
	if err := cms.Delete(t.Context(), "istio", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("none again", holds("", 0, false))
}

// TestTheAPIServerMayGo: what was read stays, and what changed meanwhile is seen when it is back.
func TestTheAPIServerMayGo(t *testing.T) {
	t.Parallel()
	c := newCluster(t, namespace("shop", nil), pod("shop", "web", "10.0.0.1"), pod("shop", "db", "10.0.0.2"))
	var down atomic.Bool
	watches := make(chan *watch.RaceFreeFakeWatcher, 100)
	fail := errors.New("connection refused, as it were")
	c.kube.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) { return down.Load(), nil, fail })
	c.kube.PrependWatchReactor("pods", func(clienttesting.Action) (bool, watch.Interface, error) {
		if down.Load() {
			return true, nil, fail
		}
		w := watch.NewRaceFreeFake()
		watches <- w
		return true, w, nil
	})
	c.start()
	w := <-watches
	down.Store(true)
	w.Stop()
	c.eventuallyFails("pods", true)
	if got, want := c.names(), "Kubernetes//Pod/shop/db Kubernetes//Pod/shop/web"; got != want {
		t.Errorf("while the API server is down there is %q, want %q", got, want)
	}
	if err := c.kube.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("pods"), "shop", "db"); err != nil {
		t.Fatal(err)
	}
	if err := c.kube.Tracker().Add(pod("shop", "new", "10.0.0.3")); err != nil {
		t.Fatal(err)
	}
	down.Store(false)
	c.until("what changed meanwhile", func(n translate.Nouns) bool {
		return n.Workloads["Kubernetes//Pod/shop/db"] == nil && n.Workloads["Kubernetes//Pod/shop/new"] != nil && n.Workloads["Kubernetes//Pod/shop/web"] != nil
	})
	c.eventuallyFails("pods", false)
}

// eventuallyFails waits until reading a kind fails, or does not.
func (c *cluster) eventuallyFails(resource string, fails bool) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("reading %s fails: %v", resource, fails), func(context.Context) bool {
		return slices.ContainsFunc(c.source.Feeds(), func(f kube.FeedStatus) bool { return f.Resource == resource && (f.Error != "") == fails })
	})
}
