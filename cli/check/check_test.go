package check_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/cli/check"
	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/fakeapi"
)

var update = flag.Bool("update", false, "rewrite golden files")

type object = fakeapi.Object

func newChecker(t *testing.T, api *fakeapi.Server) *check.Checker {
	t.Helper()
	c, err := cluster.New(api.Config, "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	return &check.Checker{Cluster: c, Version: "1.0", Page: func(context.Context, string, string, int, string) ([]byte, error) {
		return []byte(`[{"peer":"istio-system/ztunnel@n1","node":"ztunnel~10.0.0.1~zt-1.istio-system~x","types":[]}]`), nil
	}}
}

func golden(t *testing.T, name string, groups []check.Group, wantGood bool) {
	t.Helper()
	var out bytes.Buffer
	if good := check.Print(&out, groups); good != wantGood {
		t.Errorf("%s: all is well: %v, want %v", name, good, wantGood)
	}
	path := "testdata/" + name + ".golden.txt"
	if *update {
		if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func node(api *fakeapi.Server, name, kernel, arch string) {
	api.Put("/api/v1/nodes/"+name, object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": name},
		"status": object{"nodeInfo": object{"kernelVersion": kernel, "architecture": arch, "operatingSystem": "linux"}}})
}

func pod(api *fakeapi.Server, namespace, name, node string, labels, annotations object, image string) {
	api.Put("/api/v1/namespaces/"+namespace+"/pods/"+name, object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "namespace": namespace, "labels": labels, "annotations": annotations},
		"spec":     object{"nodeName": node, "containers": []any{object{"name": "c", "image": image}}}, "status": object{"phase": "Running"}})
}

func daemonSet(api *fakeapi.Server, name string, want, ready int) {
	api.Put("/apis/apps/v1/namespaces/istio-system/daemonsets/"+name, object{"apiVersion": "apps/v1", "kind": "DaemonSet",
		"metadata": object{"name": name, "namespace": "istio-system", "labels": object{"install.mistnet.io/component": "x"}},
		"status":   object{"desiredNumberScheduled": want, "updatedNumberScheduled": want, "numberAvailable": ready}})
}

// mesh is a cluster of one node with an installed mesh in which all is well.
func mesh(t *testing.T) *fakeapi.Server {
	api := fakeapi.New(t)
	api.Stored = nil
	node(api, "n1", "6.1.0-13-amd64", "amd64")
	api.Put("/api/v1/namespaces/istio-system", object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": "istio-system"}})
	api.Put("/api/v1/namespaces/shop", object{"apiVersion": "v1", "kind": "Namespace",
		"metadata": object{"name": "shop", "labels": object{"istio.io/dataplane-mode": "ambient"}}})
	api.Put("/api/v1/namespaces/istio-system/configmaps/mistnet-install", object{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": object{"name": "mistnet-install", "namespace": "istio-system"},
		"data":     object{"inventory.json": `{"version":"1.0","complete":true}`}})
	for _, ns := range []string{"default", "kube-system", "istio-system", "shop"} {
		root(api, ns, "PEM")
	}
	api.Put("/apis/apps/v1/namespaces/istio-system/deployments/istiod", object{"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": object{"name": "istiod", "namespace": "istio-system", "labels": object{"install.mistnet.io/component": "istiod"}},
		"spec":     object{"replicas": 1}, "status": object{"availableReplicas": 1}})
	daemonSet(api, "istio-cni-node", 1, 1)
	daemonSet(api, "ztunnel", 1, 1)
	pod(api, "istio-system", "istiod-1", "n1", object{"app": "istiod"}, nil, "localhost/mistnet/istiod:1.0")
	pod(api, "istio-system", "cni-1", "n1", object{"k8s-app": "istio-cni-node"}, nil, "localhost/mistnet/cni:1.0")
	pod(api, "istio-system", "zt-1", "n1", object{"app": "ztunnel"}, nil, "localhost/mistnet/ztunnel:1.0")
	pod(api, "shop", "web", "n1", nil, object{"ambient.istio.io/redirection": "enabled"}, "web")
	pod(api, "shop", "apart", "n1", object{"istio.io/dataplane-mode": "none"}, nil, "web")
	return api
}

func root(api *fakeapi.Server, namespace, pem string) {
	api.Put("/api/v1/namespaces/"+namespace+"/configmaps/istio-ca-root-cert", object{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": object{"name": "istio-ca-root-cert", "namespace": namespace}, "data": object{"root-cert.pem": pem}})
}

func TestBeforeOnAGoodCluster(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	node(api, "n1", "6.1.0-13-amd64", "amd64")
	node(api, "n2", "5.15.49-linuxkit", "arm64")
	golden(t, "before_good", newChecker(t, api).Before(t.Context()), true)
}

func TestBeforeOnABadCluster(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	node(api, "n1", "3.10.0-1160.el7.x86_64", "amd64")
	node(api, "n2", "4.19.0", "s390x")
	node(api, "n3", "strange", "amd64")
	api.Put("/apis/apps/v1/namespaces/istio-system/deployments/istiod", object{"apiVersion": "apps/v1", "kind": "Deployment",
		"metadata": object{"name": "istiod", "namespace": "istio-system"}})
	api.Deny = func(verb, plural string) bool {
		return plural == "clusterroles" && verb != "get" || plural == "daemonsets" && verb == "delete"
	}
	golden(t, "before_bad", newChecker(t, api).Before(t.Context()), false)
}

func TestAfterOnAGoodMesh(t *testing.T) {
	t.Parallel()
	golden(t, "after_good", newChecker(t, mesh(t)).After(t.Context()), true)
}

func TestAfterOnABadMesh(t *testing.T) {
	t.Parallel()
	api := mesh(t)
	daemonSet(api, "ztunnel", 2, 1)
	pod(api, "istio-system", "zt-2", "n2", object{"app": "ztunnel"}, nil, "localhost/mistnet/ztunnel:2.0")
	pod(api, "shop", "cart", "n2", nil, object{"ambient.istio.io/redirection": "pending"}, "cart")
	pod(api, "shop", "new", "n2", nil, nil, "new")
	root(api, "default", "ANOTHER")
	golden(t, "after_bad", newChecker(t, api).After(t.Context()), false)
}

func TestAfterWithoutAMesh(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	node(api, "n1", "6.1.0", "amd64")
	golden(t, "after_nothing", newChecker(t, api).After(t.Context()), false)
}

func TestAnUnansweredQuestionIsBad(t *testing.T) {
	t.Parallel()
	c := newChecker(t, mesh(t))
	c.Page = func(context.Context, string, string, int, string) ([]byte, error) {
		return nil, errors.New("no way in")
	}
	var out bytes.Buffer
	if check.Print(&out, c.After(t.Context())) || !bytes.Contains(out.Bytes(), []byte("✗ ask istiod-1 for its clients: no way in")) {
		t.Errorf("istiod does not answer, and the check says:\n%s", &out)
	}
}

func TestTag(t *testing.T) {
	t.Parallel()
	for image, want := range map[string]string{
		"a/b:1": "1", "host:5000/b": "latest", "host:5000/b:2@sha256:00": "2", "b": "latest",
	} {
		if got := check.Tag(image); got != want {
			t.Errorf("Tag(%s) = %s, want %s", image, got, want)
		}
	}
}
