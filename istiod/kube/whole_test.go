package kube_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/istiod"
)

// replica is a whole istiod.
type replica struct {
	t *testing.T
	d *istiod.Istiod
}

func runIstiod(t *testing.T, kubeconfig, name string) *replica {
	t.Helper()
	env, err := daemon.NewEnv("istiod", io.Discard, daemon.LogOptions{Level: "info", Format: "plain"})
	if err != nil {
		t.Fatal(err)
	}
	r := &replica{t: t}
	r.d, err = istiod.New(t.Context(), istiod.Config{Source: istiod.SourceKubernetes, Kubeconfig: kubeconfig, PodName: name,
		XDSAddr: "127.0.0.1:0", MonitoringAddr: "127.0.0.1:0"}, env)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run of %s = %v, want nil", name, err)
		}
	})
	return r
}

// proxy is a client of istiod that keeps a snapshot, as ztunnel does.
type proxy struct {
	t       *testing.T
	updates chan xds.Update
	snap    *mesh.Snapshot
}

func (r *replica) connect(token string) *proxy {
	r.t.Helper()
	conf, err := identity.ControlPlaneConfig(r.d.RootPEM(), "istiod.istio-system.svc")
	if err != nil {
		r.t.Fatal(err)
	}
	p := &proxy{t: r.t, updates: make(chan xds.Update, 100), snap: new(mesh.Snapshot)}
	c := xds.NewClient(xds.ClientConfig{
		Target: r.d.XDSAddr().String(), TLS: conf, Token: func(context.Context) (string, error) { return token, nil },
		Node:          &core.Node{Id: "ztunnel~10.0.0.9~ztunnel-n1.istio-system~istio-system.svc.cluster.local"},
		Subscriptions: []xds.Subscription{{TypeURL: mesh.TypeAddress, Wildcard: true}, {TypeURL: mesh.TypeAuthorization, Wildcard: true}},
		Apply:         func(_ context.Context, u xds.Update) []xds.Rejection { p.updates <- u; return nil },
	})
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := c.Run(ctx); err != nil && ctx.Err() == nil {
			r.t.Errorf("client: %v", err)
		}
	}()
	r.t.Cleanup(func() { cancel(); <-done })
	return p
}

func (p *proxy) until(what string, holds func() bool) {
	p.t.Helper()
	for !holds() {
		select {
		case u := <-p.updates:
			named := make([]wds.Named, 0, len(u.Upserts))
			for _, r := range u.Upserts {
				named = append(named, wds.Named{Name: r.Name, Body: r.Body})
			}
			delta, bad := wds.Delta(p.snap, u.TypeURL, named, u.Removes)
			if len(bad) > 0 {
				p.t.Errorf("rejected: %v", bad)
			}
			p.snap = p.snap.Apply(delta)
		case <-time.After(patience):
			p.t.Fatalf("never: %s", what)
		}
	}
}

// certify asks for the certificate of an account, with a token.
func (r *replica) certify(token, namespace, account string) error {
	r.t.Helper()
	conf, err := identity.ControlPlaneConfig(r.d.RootPEM(), "istiod.istio-system.svc")
	if err != nil {
		r.t.Fatal(err)
	}
	c, err := identity.NewCAClient(identity.CAClientConfig{Target: r.d.XDSAddr().String(), TLS: conf,
		Token: func(context.Context) (string, error) { return token, nil }})
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: namespace, ServiceAccount: account}
	csr, err := identity.NewCSR(id, key)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	_, err = c.Sign(ctx, id, csr, time.Hour)
	return err
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v (%s), want %s", what, err, got, want)
	}
}

// page reads a page of the monitoring address.
func (r *replica) page(path string) string {
	r.t.Helper()
	resp, err := http.Get("http://" + r.d.MonitoringAddr().String() + path)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(body)
}

// TestWithARealAPIServer runs two replicas with the documented permissions against a real API server: what is read,
// who is believed, what is written, and what happens when the API server dies.
func TestWithARealAPIServer(t *testing.T) {
	s := startAPIServer(t)
	kubeconfig := s.prepare()
	s.namespace("shop")
	s.account("istio-system", "ztunnel")
	s.account("shop", "sa")
	zt := pod("istio-system", "ztunnel-n1", "10.0.0.9")
	zt.UID, zt.ManagedFields, zt.Spec.ServiceAccountName = "", nil, "ztunnel"
	ztunnel, err := s.kube.CoreV1().Pods("istio-system").Create(t.Context(), zt, metav1.CreateOptions{})
	s.check(err)
	s.pod("shop", "web", "n1", "10.0.0.1")
	far := pod("shop", "far", "10.0.0.2")
	far.UID, far.ManagedFields, far.Spec.NodeName, far.Spec.ServiceAccountName = "", nil, "n2", "far"
	_, err = s.kube.CoreV1().Pods("shop").Create(t.Context(), far, metav1.CreateOptions{})
	s.check(err)

	one, two := runIstiod(t, kubeconfig, "one"), runIstiod(t, kubeconfig, "two")
	if !bytes.Equal(one.d.RootPEM(), two.d.RootPEM()) {
		t.Fatal("the replicas have different roots")
	}
	tok := s.token("istio-system", "ztunnel", ztunnel)
	proxies := []*proxy{one.connect(tok), two.connect(tok)}
	for i, p := range proxies {
		p.until(fmt.Sprintf("replica %d serves web", i), func() bool { return p.snap.Pod("shop", "web") != nil })
	}

	// Who is believed, and for whom.
	wantCode(t, "a workload of the node", one.certify(tok, "shop", "sa"), codes.OK)
	wantCode(t, "a workload of another node", one.certify(tok, "shop", "far"), codes.PermissionDenied)
	wantCode(t, "a token for the API server", one.certify(s.token("istio-system", "ztunnel", nil), "shop", "sa"), codes.Unauthenticated)
	wantCode(t, "no token of anybody", one.certify("x.y.z", "shop", "sa"), codes.Unauthenticated)
	web, err := s.kube.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{})
	s.check(err)
	webToken := s.token("shop", "sa", web)
	wantCode(t, "a workload for itself", two.certify(webToken, "shop", "sa"), codes.OK)
	wantCode(t, "a workload for another", two.certify(webToken, "istio-system", "ztunnel"), codes.PermissionDenied)

	// What is written.
	for _, ns := range []string{"shop", "default", "istio-system"} {
		s.await("root certificate in "+ns, patience, func(ctx context.Context) error {
			cm, err := s.kube.CoreV1().ConfigMaps(ns).Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
			if err == nil && cm.Data["root-cert.pem"] != string(one.d.RootPEM()) {
				err = fmt.Errorf("it holds %q", cm.Data)
			}
			return err
		})
	}
	err = s.kube.CoreV1().ConfigMaps("shop").Delete(t.Context(), "istio-ca-root-cert", metav1.DeleteOptions{})
	s.check(err)
	s.await("root certificate again", patience, func(ctx context.Context) error {
		_, err := s.kube.CoreV1().ConfigMaps("shop").Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
		return err
	})

	// What is told of it.
	leaders := 0
	for _, r := range []*replica{one, two} {
		if strings.Contains(r.page("/metrics"), "\nistiod_leader 1\n") {
			leaders++
		}
		if page := r.page("/debug/objects"); !strings.Contains(page, `"resource": "pods"`) || !strings.Contains(page, `"leads"`) {
			t.Errorf("/debug/objects does not tell what is read:\n%s", page)
		}
	}
	if leaders != 1 {
		t.Errorf("%d replicas lead, want 1", leaders)
	}

	// Kinds that come later, and their conditions.
	s.crds()
	s.create(policies, allow("shop", "guard", "shop"))
	s.create(peers, object("PeerAuthentication", "shop", "strict", map[string]any{"mtls": map[string]any{"mode": "STRICT"}}))
	for i, p := range proxies {
		p.until(fmt.Sprintf("replica %d serves the policies", i), func() bool {
			return p.snap.Policy("shop/guard") != nil && p.snap.Policy("istio-system/istio_converted_static_strict") != nil
		})
	}
	others := 0 // conditions that are not ours, all before ours by name
	condition := func(wantStatus, wantReason string, generation int64) {
		t.Helper()
		s.await("condition "+wantReason, patience, func(ctx context.Context) error {
			u, err := s.dynamic.Resource(policies).Namespace("shop").Get(ctx, "guard", metav1.GetOptions{})
			if err != nil {
				return err
			}
			list, _, err := unstructured.NestedSlice(u.Object, "status", "conditions")
			if err != nil || len(list) != others+1 {
				return fmt.Errorf("conditions = %v, %v", list, err)
			}
			c := list[others].(map[string]any)
			if c["type"] != "ZtunnelAccepted" || c["status"] != wantStatus || c["reason"] != wantReason || c["observedGeneration"] != generation {
				return fmt.Errorf("condition = %v", c)
			}
			return nil
		})
	}
	condition("True", "Accepted", 1)
	// Somebody else's condition is there to stay: the API server holds the list for one value.
	_, err = s.dynamic.Resource(policies).Namespace("shop").Patch(t.Context(), "guard", "application/json-patch+json",
		[]byte(`[{"op":"add","path":"/status/conditions/0","value":{"type":"SomebodyElses","status":"True"}}]`), metav1.PatchOptions{}, "status")
	s.check(err)
	others = 1
	_, err = s.dynamic.Resource(policies).Namespace("shop").Patch(t.Context(), "guard", "application/merge-patch+json",
		[]byte(`{"spec":{"action":"AUDIT"}}`), metav1.PatchOptions{})
	s.check(err)
	condition("False", "UnsupportedValue", 2)
	for i, p := range proxies {
		p.until(fmt.Sprintf("replica %d takes the policy back", i), func() bool { return p.snap.Policy("shop/guard") == nil })
	}

	// The API server dies: what was known is served on, and who was known is believed.
	s.down()
	later := one.connect(tok)
	later.until("a proxy that connects now gets web", func() bool { return later.snap.Pod("shop", "web") != nil })
	wantCode(t, "a certificate meanwhile", one.certify(tok, "shop", "sa"), codes.OK)
	wantCode(t, "an unknown token meanwhile", one.certify("new.token.now", "shop", "sa"), codes.Unavailable)
	for _, r := range []*replica{one, two} {
		if page := r.page("/ready"); page != "ready\n" {
			t.Errorf("/ready while the API server is down = %q, want ready", page)
		}
		s.await("it is told that the API server is down", patience, func(context.Context) error {
			if !strings.Contains(r.page("/metrics"), `istiod_source_failing{resource="pods"} 1`) {
				return errors.New("istiod_source_failing is 0")
			}
			return nil
		})
	}
	s.up()
	s.pod("shop", "new", "n1", "10.0.0.3")
	for i, p := range append(proxies, later) {
		p.until(fmt.Sprintf("proxy %d hears of the pod made since", i), func() bool { return p.snap.Pod("shop", "new") != nil })
	}
}
