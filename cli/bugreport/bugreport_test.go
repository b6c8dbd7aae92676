package bugreport_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/cli/bugreport"
	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/fakeapi"
)

type object = fakeapi.Object

func TestReport(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	api.Put("/api/v1/namespaces/istio-system/secrets/istio-ca-secret", object{"apiVersion": "v1", "kind": "Secret",
		"metadata": object{"name": "istio-ca-secret", "namespace": "istio-system"}, "data": object{"ca-key.pem": "TOPSECRET"}})
	api.Put("/api/v1/namespaces/istio-system/pods/ztunnel-1", object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": "ztunnel-1", "namespace": "istio-system", "labels": object{"app": "ztunnel"},
			"annotations": object{"kubectl.kubernetes.io/last-applied-configuration": "TOPSECRET"}},
		"spec": object{"containers": []any{object{"name": "istio-proxy", "image": "z:1",
			"env": []any{object{"name": "DB_PASSWORD", "value": "TOPSECRET"}, object{"name": "PLAIN", "value": "seen"}}}}},
		"status": object{"phase": "Running"}})
	api.Put("/api/v1/namespaces/istio-system/configmaps/istio", object{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": object{"name": "istio", "namespace": "istio-system"}, "data": object{"mesh": "trustDomain: x"}})
	api.Put("/api/v1/namespaces/default/configmaps/private", object{"apiVersion": "v1", "kind": "ConfigMap",
		"metadata": object{"name": "private", "namespace": "default"}, "data": object{"x": "TOPSECRET"}})
	c, err := cluster.New(api.Config, "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = bugreport.Write(t.Context(), &out, bugreport.Options{
		Cluster: c, Version: "1", Now: time.Unix(0, 0), Say: func(string, ...any) {},
		Page: func(_ context.Context, _, _ string, _ int, path string) ([]byte, error) {
			if path == "/metrics" {
				return nil, errors.New("no metrics today")
			}
			return []byte(`{"workloads":[]}`), nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, &out)
	for name, want := range map[string]string{
		"check.txt":                       "Kubernetes API",
		"objects/pods.yaml":               "value: seen",
		"objects/configmaps.yaml":         "trustDomain: x",
		"pods/ztunnel-1/config_dump.json": "workloads",
		"errors.txt":                      "/metrics of ztunnel-1: no metrics today",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s is %q, want it to hold %q", name, files[name], want)
		}
	}
	for name, text := range files {
		if strings.Contains(text, "TOPSECRET") {
			t.Errorf("%s gives a secret away:\n%s", name, text)
		}
	}
}

func unpack(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	zip, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for a := tar.NewReader(zip); ; {
		h, err := a.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(a)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(h.Name, "mistnet-bug-report/")] = string(b)
	}
}

func TestInterruptedReportFails(t *testing.T) {
	t.Parallel()
	api := fakeapi.New(t)
	c, err := cluster.New(api.Config, "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := bugreport.Write(ctx, io.Discard, bugreport.Options{Cluster: c, Say: func(string, ...any) {}}); !errors.Is(err, context.Canceled) {
		t.Errorf("Write = %v, want canceled", err)
	}
}
