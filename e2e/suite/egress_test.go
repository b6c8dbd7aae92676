package suite_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mistnet/mistnet/e2e/lab"
	"github.com/mistnet/mistnet/internal/linux"
)

// Where the TLS server of TestEgress is. The mesh knows beyondAddr, where DNS is, as that of the API server's Service, where hosts
// that clients choose never lead.
const (
	outsideAddr = "10.89.0.2"
	outsidePort = "18443"
)

// TestEgress: applications speak plain HTTP, and a waypoint makes of it TLS to servers outside of the cluster, which DNS knows:
// with the roots of a Secret, with a certificate of its own, and to hosts that nobody listed. What is wrong is refused, said in a
// condition, and well as soon as it is mended.
func TestEgress(t *testing.T) {
	s := newSpace(t, "e2e-egress", true)
	s.installGatewayAPI()
	good, bad := newAuthority(s, "good"), newAuthority(s, "bad")
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: %[1]s, labels: {app: client}}
spec:
  nodeName: %[2]s
  terminationGracePeriodSeconds: 1
  hostAliases:
  - {ip: 240.1.1.1, hostnames: [bank.example]}
  - {ip: 240.1.1.2, hostnames: [vault.example]}
  - {ip: 240.1.1.3, hostnames: [one.buckets.example, meshed.buckets.example, api.buckets.example, gone.buckets.example, elsewhere.example]}
  containers: [{name: app, image: %[3]q, args: [wait, 1h]}]
`, s.name, cluster.Node(1).Name, lab.AppImage)))
	s.ready("client")
	s.deploy(workload{name: "web", node: cluster.Node(2)})
	istiod := (&space{t, system}).clusterIP("istiod")
	serveNames(s, map[string]string{"istiod.istio-system.svc": istiod, "bank.example": outsideAddr, "vault.example": outsideAddr,
		"one.buckets.example": outsideAddr, "meshed.buckets.example": s.pod("web").Status.PodIP, "api.buckets.example": beyondAddr})
	serveTLS(s, good)
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(leaving, s.name, outsidePort, beyondAddr)))
	_, err := cluster.Kubectl(t.Context(), "wait", "--for=condition=Programmed", "--timeout=2m", "-n", s.name, "gateway/waypoint")
	s.must(err)
	s.redirected(true)
	answers := func(what, url, want string) {
		t.Helper()
		s.eventually(what, func() error {
			out, err := s.run("client", "get", url)
			if status, _, _ := strings.Cut(out, " "); err == nil && status != want && !strings.HasSuffix(out, " "+want+"\n") {
				err = fmt.Errorf("the answer is %q, want %q", out, want)
			}
			return err
		})
	}

	// As it comes, istiod may read none.
	answers("without the Secret nothing leaves", "http://bank.example/", "503")
	s.says("destinationrule", "bank", "WaypointAccepted", "False Invalid ", "bank-roots")
	s.must(cluster.Apply(t.Context(), fmt.Sprintf(mayRead, s.name)))
	s.credential("bank-roots", map[string][]byte{"ca.crt": good.root()})
	answers("TLS with the roots of the Secret", "http://bank.example/", "bank.example to bank.example from nobody")
	s.says("destinationrule", "bank", "WaypointAccepted", "True Accepted ", "")
	s.credential("bank-roots", map[string][]byte{"ca.crt": bad.root()})
	answers("not to whom other roots do not know", "http://bank.example/", "503")
	s.credential("bank-roots", map[string][]byte{"ca.crt": good.root()})
	answers("and to whom they know again", "http://bank.example/", "bank.example to bank.example from nobody")
	answers("a policy holds for what leaves", "http://bank.example/admin", "403")

	cert, key := good.issue("teller")
	s.credential("vault-client", map[string][]byte{"ca.crt": good.root(), "tls.crt": cert, "tls.key": key})
	answers("mutual TLS", "http://vault.example/", "vault.example to vault.example from teller")
	cert, key = good.issue("manager")
	s.credential("vault-client", map[string][]byte{"ca.crt": good.root(), "tls.crt": cert, "tls.key": key})
	answers("a new certificate is shown at once", "http://vault.example/", "vault.example to vault.example from manager")
	s.credential("vault-client", map[string][]byte{"ca.crt": good.root()})
	answers("without a certificate nothing leaves", "http://vault.example/", "503")
	s.says("destinationrule", "vault", "WaypointAccepted", "False Invalid ", "vault-client")

	s.credential("bucket-roots", map[string][]byte{"ca.crt": good.root()})
	answers("nor to the cluster's API server", "http://api.buckets.example/", "503")
	answers("a host that nobody listed", "http://one.buckets.example/", "one.buckets.example to one.buckets.example from nobody")
	answers("a name that DNS does not know", "http://gone.buckets.example/", "503")
	answers("no way around what the mesh says of a pod", "http://meshed.buckets.example/", "503")
	answers("nor to the cluster's API server", "http://api.buckets.example/", "503")
	answers("a host that no ServiceEntry covers", "http://elsewhere.example/", "404")
}

// credential makes a Secret of the namespace what it is to be.
func (s *space) credential(name string, data map[string][]byte) {
	s.Helper()
	_, err := cluster.Kubectl(s.Context(), "-n", s.name, "delete", "secret", name, "--ignore-not-found")
	s.must(err)
	text := fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: %s}\ndata:\n", name, s.name)
	for key, value := range data {
		text += fmt.Sprintf("  %s: %s\n", key, base64.StdEncoding.EncodeToString(value))
	}
	s.must(cluster.Apply(s.Context(), text))
}

// hostBeyond is the network namespace of what is beyond the nodes.
func hostBeyond(s *space) *linux.NetNS {
	s.Helper()
	ns, err := linux.OpenNetNS(filepath.Join("/run/netns", "me2e-"+cluster.Name()+"-cp"))
	s.must(err)
	s.Cleanup(func() { _ = ns.Close() })
	return ns
}

// serveTLS is an application beyond the nodes that says which host it was asked for, under which name, and by whom. As
// vault.example it wants to know the last.
func serveTLS(s *space, ca *authority) {
	s.Helper()
	ns := hostBeyond(s)
	ip := func(what string) error {
		out, err := exec.Command("ip", "-n", "me2e-"+cluster.Name()+"-cp", "address", what, outsideAddr+"/32", "dev", "lab0").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	}
	s.must(ip("add"))
	s.Cleanup(func() {
		if err := ip("del"); err != nil {
			s.Error(err)
		}
	})
	l, err := ns.Listen(s.Context(), linux.ListenOptions{Addr: netip.MustParseAddrPort(outsideAddr + ":" + outsidePort)})
	s.must(err)
	cert, key := ca.issue("bank.example", "vault.example", "*.buckets.example")
	pair, err := tls.X509KeyPair(cert, key)
	s.must(err)
	known := x509.NewCertPool()
	known.AddCert(ca.cert)
	anybody := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	somebody := anybody.Clone()
	somebody.ClientAuth, somebody.ClientCAs = tls.RequireAndVerifyClientCert, known
	server := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			who = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		fmt.Fprintf(w, "%s to %s from %s", r.Host, r.TLS.ServerName, who)
	})}
	done := make(chan error, 1)
	go func() {
		done <- server.Serve(tls.NewListener(l, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			if h.ServerName == "vault.example" {
				return somebody, nil
			}
			return anybody, nil
		}}))
	}()
	s.Cleanup(func() {
		if err := errors.Join(server.Close(), ignoreClosed(<-done)); err != nil {
			s.Error(err)
		}
	})
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// serveNames is the DNS beyond the nodes. It knows these names, and that they have no other addresses.
func serveNames(s *space, addrs map[string]string) {
	s.Helper()
	var conn net.PacketConn
	s.must(hostBeyond(s).Do(func() (err error) {
		conn, err = (&net.ListenConfig{}).ListenPacket(context.Background(), "udp4", beyondAddr+":53")
		return err
	}))
	done := make(chan error, 1)
	go func() {
		for buf := make([]byte, 1500); ; {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				done <- err
				return
			}
			if answer := lookUp(buf[:n], addrs); answer != nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	s.Cleanup(func() {
		if err := errors.Join(conn.Close(), ignoreClosed(<-done)); err != nil {
			s.Error(err)
		}
	})
}

// lookUp answers one question of DNS; nil: it is none.
func lookUp(question []byte, addrs map[string]string) []byte {
	var m dnsmessage.Message
	if m.Unpack(question) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	addr, ok := addrs[strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	} else if q.Type == dnsmessage.TypeA {
		m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 1},
			Body: &dnsmessage.AResource{A: netip.MustParseAddr(addr).As4()}}}
	}
	answer, err := m.Pack()
	if err != nil {
		return nil
	}
	return answer
}

// authority signs certificates that are good for as long as a test.
type authority struct {
	s    *space
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(s *space, name string) *authority {
	s.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	a := &authority{s: s, key: key}
	template := valid(name)
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	s.must(err)
	a.cert, err = x509.ParseCertificate(der)
	s.must(err)
	return a
}

func valid(name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
}

func (a *authority) root() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue makes a certificate for names.
func (a *authority) issue(names ...string) (cert, key []byte) {
	a.s.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	a.s.must(err)
	template := valid(names[0])
	template.DNSNames = names
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	a.s.must(err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	a.s.must(err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// mayRead lets istiod read the Secrets that are named, as docs/security.md says.
const mayRead = `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: istiod-credentials, namespace: %[1]s}
rules: [{apiGroups: [""], resources: [secrets], verbs: [list, watch],
  resourceNames: [bank-roots, bank-roots-cacert, vault-client, vault-client-cacert, bucket-roots, bucket-roots-cacert]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: istiod-credentials, namespace: %[1]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: istiod-credentials}
subjects: [{kind: ServiceAccount, name: istiod, namespace: istio-system}]
`

// leaving wants the namespace, the port of the TLS server and the address of DNS.
const leaving = `
apiVersion: v1
kind: ConfigMap
metadata: {name: options, namespace: %[1]s}
data:
  deployment: "spec: {template: {spec: {dnsPolicy: None, dnsConfig: {nameservers: [%[3]s]}}}}"
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: %[1]s}
spec:
  gatewayClassName: istio-waypoint
  infrastructure: {parametersRef: {group: "", kind: ConfigMap, name: options}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: bank, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [bank.example]
  addresses: [240.1.1.1]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[2]s}]
  resolution: DNS
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vault, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: [vault.example]
  addresses: [240.1.1.2]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[2]s}]
  resolution: DNS
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: buckets, namespace: %[1]s, labels: {istio.io/use-waypoint: waypoint}}
spec:
  hosts: ["*.buckets.example"]
  addresses: [240.1.1.3]
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: %[2]s}]
  resolution: DYNAMIC_DNS
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: bank, namespace: %[1]s}
spec:
  host: bank.example
  trafficPolicy: {tls: {mode: SIMPLE, credentialName: bank-roots}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: vault, namespace: %[1]s}
spec:
  host: vault.example
  trafficPolicy: {tls: {mode: MUTUAL, credentialName: vault-client, sni: vault.example}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: buckets, namespace: %[1]s}
spec:
  host: "*.buckets.example"
  trafficPolicy: {tls: {mode: SIMPLE, credentialName: bucket-roots}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bank, namespace: %[1]s}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: bank}]
  action: DENY
  rules: [{to: [{operation: {paths: [/admin]}}]}]
`
