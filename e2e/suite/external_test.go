package suite_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/linux"
)

// Beyond the pods: what a mesh calls external. The first is beyond the nodes, too, on the network that they are on.
const (
	beyondAddr = "10.89.0.1"
	beyondPort = "18080"
)

// TestExternal: what ServiceEntries and WorkloadEntries declare is reached, by address, by range and by name, outside of the
// mesh and in it, and no longer when they are gone.
func TestExternal(t *testing.T) {
	s := newSpace(t, "e2e-external", true)
	one, two := cluster.Node(1), cluster.Node(2)
	s.deploy(workload{name: "client", node: one}, workload{name: "server", node: two}, workload{name: "spare", node: two})
	s.redirected(true)
	beyond(s, "cp", beyondAddr)
	beyond(s, two.Name, two.IP.String())
	server := s.pod("server").Status.PodIP
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(declared, s.name, beyondAddr, beyondPort, server, netip.PrefixFrom(two.IP, 30).Masked())))
	reach := func(what, url, want string) {
		t.Helper()
		s.eventually(what, func() error {
			out, err := s.run("client", "get", url)
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("the answer is %q, want one with %q", out, want)
			}
			return err
		})
	}

	reach("addresses of endpoints, ports by name", "http://240.1.0.1/", "beyond")
	s.eventually("and said to be the service's", func() error { return s.logged(one, `"static.example"`) })
	reach("the destination stays in a range that is passed through", "http://"+two.IP.String()+":"+beyondPort+"/", "beyond")
	s.eventually("and said to be the range's", func() error { return s.logged(one, `"*.range.example"`) })
	reach("endpoints by name", "http://240.1.0.3/", "beyond")
	reach("a Service that selects a machine", "http://machine/", "beyond")

	wire := s.capture()
	reach("pods that are selected", "http://240.1.0.4/?to-selected-pod", "server")
	reach("a machine in the mesh, as who it is", "http://240.1.0.5/?to-machine", "server")
	s.tunnelled(wire, "to-selected-pod")
	s.tunnelled(wire, "to-machine")
	if out, err := s.run("client", "get", "http://240.1.0.6/"); err == nil {
		t.Errorf("a machine that is somebody else than declared was believed: %s", out)
	}

	problem := func(object, words string) {
		t.Helper()
		s.eventually("istiod tells of "+object, func() error {
			leader, err := s.leader()
			if err != nil {
				return err
			}
			page, err := s.admin(leader, "15014", "/debug/problems")
			if err == nil && (!strings.Contains(page, object) || !strings.Contains(page, words)) {
				err = errors.New(page)
			}
			return err
		})
	}
	problem("ServiceEntry "+s.name+"/unaddressed", "no addresses")
	problem("WorkloadEntry "+s.name+"/socket", "sockets of a machine")
	problem("sidecars.networking.istio.io "+s.name+"/less", "not honoured yet")

	_, err := cluster.Kubectl(t.Context(), "-n", s.name, "delete", "serviceentry", "static")
	s.must(err)
	s.eventually("what was declared is gone", func() error {
		if out, err := s.run("client", "get", "http://240.1.0.1/"); err == nil {
			return errors.New(out)
		}
		return nil
	})
	reach("and nothing else", "http://240.1.0.4/", "server")
}

// beyond serves HTTP at an address of one of the lab's hosts, which is no pod, until the test ends.
func beyond(s *space, host, addr string) {
	s.Helper()
	ns, err := linux.OpenNetNS(filepath.Join("/run/netns", "me2e-"+cluster.Name()+"-"+host))
	s.must(err)
	l, err := ns.Listen(s.Context(), linux.ListenOptions{Addr: netip.MustParseAddrPort(addr + ":" + beyondPort)})
	s.must(err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "beyond") })}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	s.Cleanup(func() {
		if err := errors.Join(server.Close(), ns.Close()); err != nil {
			s.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			s.Error(err)
		}
	})
}

// declared wants the namespace, the address and port beyond, the address of pod server, and the range beyond.
const declared = `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: static, namespace: %[1]s}
spec:
  hosts: [static.example]
  addresses: [240.1.0.1]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
  endpoints: [{address: %[2]s, ports: {http: %[3]s}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: range, namespace: %[1]s}
spec:
  hosts: ["*.range.example"]
  addresses: [%[5]s] # of which no endpoint is a workload: those are known by themselves
  ports: [{number: %[3]s, name: http, protocol: HTTP}]
  resolution: NONE
---
apiVersion: v1
kind: Service
metadata: {name: named, namespace: %[1]s}
spec: {clusterIP: None, ports: [{name: http, port: %[3]s}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: named, namespace: %[1]s, labels: {kubernetes.io/service-name: named}}
addressType: IPv4
ports: [{name: http, port: %[3]s}]
endpoints: [{addresses: [%[2]s]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: dns, namespace: %[1]s}
spec:
  hosts: [dns.example]
  addresses: [240.1.0.3]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[3]s}]
  resolution: DNS
  endpoints: [{address: named.%[1]s.svc.cluster.local}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: selecting, namespace: %[1]s}
spec:
  hosts: [selecting.example]
  addresses: [240.1.0.4]
  ports: [{number: 80, name: web, protocol: HTTP, targetPort: 8080}]
  location: MESH_INTERNAL
  resolution: STATIC
  workloadSelector: {labels: {app: server}}
---
apiVersion: v1
kind: Service
metadata: {name: machine, namespace: %[1]s}
spec: {selector: {machine: plain}, ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: plain, namespace: %[1]s, labels: {machine: plain}}
spec: {address: %[2]s, ports: {web: %[3]s}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: meshed, namespace: %[1]s}
spec:
  hosts: [meshed.example]
  addresses: [240.1.0.5]
  ports: [{number: 80, name: web, protocol: HTTP, targetPort: 8080}]
  location: MESH_INTERNAL
  resolution: STATIC
  workloadSelector: {labels: {machine: meshed}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: meshed, namespace: %[1]s, annotations: {ambient.istio.io/redirection: enabled}}
spec: {address: %[4]s, serviceAccount: server, labels: {machine: meshed}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: impostor, namespace: %[1]s}
spec:
  hosts: [impostor.example]
  addresses: [240.1.0.6]
  ports: [{number: 80, name: web, protocol: HTTP, targetPort: 8080}]
  location: MESH_INTERNAL
  resolution: STATIC
  workloadSelector: {labels: {machine: impostor}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: impostor, namespace: %[1]s, annotations: {ambient.istio.io/redirection: enabled}}
spec: {address: %[4]s, serviceAccount: somebody-else, labels: {machine: impostor}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: unaddressed, namespace: %[1]s}
spec:
  hosts: [unaddressed.example]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: DNS
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: socket, namespace: %[1]s}
spec: {address: "unix:///run/web"}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: less, namespace: %[1]s}
spec: {egress: [{hosts: ["./*"]}]}
`
