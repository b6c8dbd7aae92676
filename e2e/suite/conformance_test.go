package suite_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/e2e/lab"
)

// The namespaces of upstream's suite for meshes, which it makes itself unless they are there.
const (
	conformanceServers = "gateway-conformance-mesh"
	conformanceClients = "gateway-conformance-mesh-consumer"
)

// TestConformance runs the Gateway API's own suite for meshes in namespaces with a waypoint. It takes minutes and is asked for
// by MISTNET_E2E_CONFORMANCE: 1, or the name of one of upstream's tests. MISTNET_E2E_REPORT names the file to which
// upstream's report goes. What upstream skips is about features that are not claimed, gateways above all.
func TestConformance(t *testing.T) {
	only := os.Getenv("MISTNET_E2E_CONFORMANCE")
	if only == "" {
		t.Skip("takes minutes: make conformance runs it")
	}
	s := newSpace(t, "e2e-conformance", false)
	s.installGatewayAPI()
	s.loadEcho()
	for _, ns := range []string{conformanceServers, conformanceClients} {
		s.makeWaypoint(ns)
	}
	args := []string{
		"-test.v=test2json", "-test.run=^TestMesh$", "-test.timeout=40m",
		"-namespace-labels=" + modeLabel + "=ambient,istio.io/use-waypoint=waypoint",
		"-organization=mistnet", "-project=mistnet", "-url=https://github.com/mistnet/mistnet",
		"-version=v" + s.version(), "-contact=https://github.com/mistnet/mistnet/issues",
	}
	if only != "1" {
		args = append(args, "-run-test="+only)
	}
	if report := os.Getenv("MISTNET_E2E_REPORT"); report != "" {
		args = append(args, "-report-output="+report)
	}
	cmd := cluster.Command(t.Context(), append([]string{"go", "tool", "test2json", s.conformanceProgram()}, args...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	s.must(err)
	s.must(cmd.Start())
	tests, all, err := outcomes(events)
	if err = errors.Join(err, cmd.Wait()); err != nil || len(tests) == 0 {
		t.Errorf("upstream's suite: %v; it ran %d tests\n%s", err, len(tests), all)
	}
	for _, o := range tests {
		t.Run(o.name, func(t *testing.T) {
			if o.action != "pass" {
				t.Errorf("%s\n%s", o.action, o.output.String())
			}
		})
	}
}

// outcome is that of one of upstream's tests, with what it and those below it said.
type outcome struct {
	name, action string
	output       strings.Builder
}

// outcomes reads the events of TestMesh (go doc test2json): the tests right below it that were not skipped, in order, and what
// TestMesh itself said.
func outcomes(events io.Reader) (tests []*outcome, all string, err error) {
	var self outcome
	known := map[string]*outcome{}
	dec := json.NewDecoder(events)
	for {
		var e struct{ Action, Test, Output string }
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return tests, self.output.String(), nil
		} else if err != nil {
			return tests, self.output.String(), err
		}
		names := strings.Split(e.Test, "/")
		o := &self
		if len(names) > 1 {
			if o = known[names[1]]; o == nil {
				o = &outcome{name: names[1]}
				known[o.name] = o
			}
		}
		o.output.WriteString(e.Output)
		if len(names) == 2 && (e.Action == "pass" || e.Action == "fail") {
			o.action = e.Action
			tests = append(tests, o)
			fmt.Fprintln(os.Stderr, "conformance:", o.name, o.action)
		}
	}
}

// installGatewayAPI puts the Gateway API's definitions in until the test ends, unless they are there.
func (s *space) installGatewayAPI() {
	s.Helper()
	if _, err := cluster.Kubectl(s.Context(), "get", "crd", "gateways.gateway.networking.k8s.io"); err == nil {
		return
	}
	dir := gatewayDefinitions(s)
	s.Cleanup(func() {
		if os.Getenv("MISTNET_E2E_KEEP") != "" {
			return
		}
		if out, err := cluster.Kubectl(context.Background(), "delete", "--ignore-not-found", "--timeout=6m", "-k", dir); err != nil {
			s.Errorf("remove %s: %v\n%s", dir, err, out)
		}
	})
	_, err := cluster.Kubectl(s.Context(), "apply", "--server-side", "-k", dir)
	s.must(err)
	for _, kind := range []string{"gatewayclasses", "gateways", "httproutes", "grpcroutes"} {
		_, err := cluster.Kubectl(s.Context(), "wait", "--for=condition=Established", "--timeout=2m", "crd/"+kind+".gateway.networking.k8s.io")
		s.must(err)
	}
}

// conformanceProgram builds upstream's suite, which takes minutes the first time.
func (s *space) conformanceProgram() string {
	s.Helper()
	program := filepath.Join(s.TempDir(), "conformance.test")
	cmd := exec.CommandContext(s.Context(), "nice", "-n", "19", "go", "test", "-c", "-o", program, ".")
	cmd.Dir = "../bins/gatewayapi"
	cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("build upstream's suite: %v\n%s", err, out)
	}
	return program
}

// loadEcho makes an image of e2e/echo under every name that upstream's manifests for meshes ask for, and loads it: those of a
// registry cannot be pulled.
func (s *space) loadEcho() {
	s.Helper()
	cmd := exec.CommandContext(s.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api/conformance")
	cmd.Dir = "../bins/gatewayapi"
	dir, err := cmd.Output()
	s.must(err)
	manifests, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), "mesh", "manifests.yaml"))
	s.must(err)
	images := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\s*-? ?image: (\S+)$`).FindAllStringSubmatch(string(manifests), -1) {
		images[m[1]] = true
	}
	if len(images) == 0 {
		s.Fatal("upstream's manifests name no image")
	}
	program := filepath.Join(s.TempDir(), "echo")
	cmd = exec.CommandContext(s.Context(), "nice", "-n", "19", "go", "build", "-trimpath", "-buildvcs=false", "-o", program, "../cmd/echo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("build e2e/cmd/echo: %v\n%s", err, out)
	}
	for image := range images {
		archive := filepath.Join(s.TempDir(), "image.tar")
		s.must(lab.PackImage(archive, image, program, "client"))
		s.must(cluster.LoadImages(s.Context(), archive))
	}
}

// makeWaypoint makes a namespace of the mesh, whose services have a waypoint of their own, and waits until that works.
func (s *space) makeWaypoint(namespace string) {
	s.Helper()
	s.Cleanup(func() {
		if os.Getenv("MISTNET_E2E_KEEP") == "" {
			_, _ = cluster.Kubectl(context.Background(), "delete", "namespace", "--ignore-not-found", "--wait=false", namespace)
		}
	})
	s.must(cluster.Apply(s.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Namespace
metadata: {name: %[1]s, labels: {%[2]s: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: %[1]s, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`, namespace, modeLabel)))
	_, err := cluster.Kubectl(s.Context(), "wait", "--for=condition=Programmed", "--timeout=2m", "-n", namespace, "gateway/waypoint")
	s.must(err)
}

// version is that of the charts.
func (s *space) version() string {
	s.Helper()
	b, err := os.ReadFile("../../manifests/charts/istiod/Chart.yaml")
	s.must(err)
	m := regexp.MustCompile(`(?m)^appVersion: "(\S+)"$`).FindSubmatch(b)
	if m == nil {
		s.Fatal("the chart has no appVersion")
	}
	return string(m[1])
}
