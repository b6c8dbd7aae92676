package waypoint_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// zone is what the resolver of this process knows; of every other name it knows that there is none.
var zone = struct {
	mu    sync.Mutex
	addrs map[string][]string // by name in lower case, with its dot
	wild  map[string]string   // by the end of a name
	asked map[string]int
	block map[string]chan struct{} // closed when the answer may come
}{addrs: map[string][]string{}, wild: map[string]string{}, asked: map[string]int{}, block: map[string]chan struct{}{}}

func TestMain(m *testing.M) {
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go serveDNS(ours)
		return theirs, nil
	}}
	os.Exit(m.Run())
}

// serveDNS answers questions on a connection as on one of TCP (RFC 1035, 4.2.2).
func serveDNS(conn net.Conn) {
	defer conn.Close()
	for {
		var size [2]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		text := make([]byte, binary.BigEndian.Uint16(size[:]))
		if _, err := io.ReadFull(conn, text); err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(text) != nil || len(m.Questions) != 1 {
			return
		}
		q := m.Questions[0]
		m.Response, m.Authoritative, m.Additionals = true, true, nil
		zone.mu.Lock()
		name := strings.ToLower(q.Name.String())
		zone.asked[name]++
		addrs, known := zone.addrs[name]
		for end, addr := range zone.wild {
			if strings.HasSuffix(name, end) {
				addrs, known = []string{addr}, true
			}
		}
		wait := zone.block[name]
		zone.mu.Unlock()
		if wait != nil {
			<-wait
		}
		if !known {
			m.RCode = dnsmessage.RCodeNameError
		}
		for _, text := range addrs {
			h := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type, TTL: 1}
			switch a := netip.MustParseAddr(text); {
			case a.Is4() && q.Type == dnsmessage.TypeA:
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
			case a.Is6() && q.Type == dnsmessage.TypeAAAA:
				m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
			}
		}
		out, err := m.AppendPack(make([]byte, 2))
		if err != nil {
			return
		}
		binary.BigEndian.PutUint16(out, uint16(len(out)-2))
		if _, err := conn.Write(out); err != nil {
			return
		}
	}
}

func named53(name string, addrs ...string) {
	zone.mu.Lock()
	defer zone.mu.Unlock()
	zone.addrs[name+"."] = addrs
}

func asked53(name string) int {
	zone.mu.Lock()
	defer zone.mu.Unlock()
	return zone.asked[name+"."]
}

// dynamic publishes a service of a wildcard, of which HTTP's port is 80 and TLS's 443.
func (l *lab) dynamic(hostname, vip string, http, tls uint16) *mesh.Service {
	l.t.Helper()
	svc := &mesh.Service{Name: "out", Namespace: "shop", Hostname: hostname, Waypoint: gateway, Dynamic: true,
		VIPs:  []mesh.VIP{{Prefix: netip.PrefixFrom(netip.MustParseAddr(vip), 32)}},
		Ports: []mesh.Port{{ServicePort: 80, TargetPort: http, App: mesh.AppHTTP1}, {ServicePort: 443, TargetPort: tls, App: mesh.AppTLS}}}
	body, err := wds.EncodeService(svc)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeAddress, xds.Resource{Name: svc.Key(), Body: body})
	l.eventually("service known", func() bool { return strings.Contains(l.page(":15000/config_dump"), `"`+hostname+`"`) })
	return svc
}

func (l *lab) askFor(host, url string) (*http.Response, string) {
	l.t.Helper()
	req, err := http.NewRequestWithContext(l.t.Context(), "GET", url, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	req.Host = host
	return l.do(req)
}

// TestDynamicHosts: a request goes to the host that it asks for, if the service's hostname covers that, whatever the case, port or
// dot it is written with; never to what the mesh has itself, to this machine or its link.
func TestDynamicHosts(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	server := named(t, "api")
	_, port, _ := net.SplitHostPort(server.String())
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	inside := loopback()
	l.workloads(&mesh.Workload{UID: "Kubernetes//Pod/shop/inside", Name: "inside", Namespace: "shop", Addrs: addrs(inside)})
	l.dynamic("*.one.test", "10.9.0.2", server.Port(), 1)
	l.known("cart")
	named53("api.one.test", server.Addr().String())
	named53("a.b.one.test", server.Addr().String())
	named53("one.test", server.Addr().String())
	named53("api.two.test", server.Addr().String())
	named53("inside.one.test", inside)
	named53("virtual.one.test", "10.9.0.1")
	named53("own-virtual.one.test", "10.9.0.2")
	named53("link.one.test", "169.254.169.254", "fe80::1")
	named53("translated.one.test", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b::"+inside)
	named53("cloud.one.test", "fd00:ec2::254", "fd20:ce::254")
	named53("many.one.test", "224.0.0.1", "255.255.255.255")
	named53("any.one.test", "0.0.0.0", "::")
	named53("gate.one.test", l.ip)
	named53("some.one.test", "169.254.169.254", server.Addr().String(), inside)
	for _, c := range []struct {
		host   string
		status int
		body   string
		flags  string
	}{
		{"api.one.test", 200, "api /", "-"},
		{"API.One.Test.", 200, "api /", "-"},
		{"api.one.test:" + port, 200, "api /", "-"},
		{"api.one.test:9", 200, "api /", "-"}, // the port of the service counts
		{"a.b.one.test", 200, "api /", "-"},
		{"some.one.test", 200, "api /", "-"},
		{"one.test", 404, "", "NR"},
		{".one.test", 404, "", "NR"},
		{"api.two.test", 404, "", "NR"},
		{"api.two.test.one.test.", 503, "DNS resolution failure", "DF"},
		{server.String(), 404, "", "NR"},
		{"api..one.test", 404, "", "NR"},
		{"none.one.test", 503, "DNS resolution failure", "DF"},
		{"inside.one.test", 503, "DNS resolution failure", "DF"},
		{"virtual.one.test", 503, "DNS resolution failure", "DF"},
		{"own-virtual.one.test", 503, "DNS resolution failure", "DF"},
		{"link.one.test", 503, "DNS resolution failure", "DF"},
		{"translated.one.test", 503, "DNS resolution failure", "DF"},
		{"cloud.one.test", 503, "DNS resolution failure", "DF"},
		{"many.one.test", 503, "DNS resolution failure", "DF"},
		{"any.one.test", 503, "DNS resolution failure", "DF"},
		{"gate.one.test", 503, "DNS resolution failure", "DF"},
	} {
		resp, body := l.askFor(c.host, "http://10.9.0.2/")
		if resp.StatusCode != c.status || body != c.body {
			t.Errorf("%s: %d %q, want %d %q", c.host, resp.StatusCode, body, c.status, c.body)
		}
		l.eventually("logged", func() bool {
			log := l.log.String()
			return strings.Contains(log, fmt.Sprintf(`"authority":%q`, c.host)) && strings.Contains(log, fmt.Sprintf(`"response_flags":%q`, c.flags))
		})
	}
	if n := asked53("api.one.test"); n < 1 || n > 4 {
		t.Errorf("the name was asked for %d times, want once for each family, or twice", n)
	}
	if n := asked53("api.one.test.shop.svc.cluster.local"); n != 0 {
		t.Error("a name was looked for in a search domain")
	}

	// A rule may send there too, under the same terms, and choose the host by rewriting it.
	rule := mesh.HTTPRule{Backends: []mesh.Backend{{Ref: mesh.BackendRef{Namespace: "shop", Hostname: "*.one.test"}, Weight: 1}}}
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Matches: prefix("/rewritten"), Rewrite: &mesh.Rewrite{Authority: "api.one.test"}, Backends: rule.Backends}, rule)
	if resp, _ := l.askFor("cart", "http://10.9.0.1/"); resp.StatusCode != 404 {
		t.Errorf("a rule sends to a host that is not covered: %d, want 404", resp.StatusCode)
	}
	if resp, body := l.askFor("cart", "http://10.9.0.1/rewritten"); resp.StatusCode != 200 || body != "api /rewritten" {
		t.Errorf("a rule chooses the host: %d %q, want api's answer", resp.StatusCode, body)
	}
}

// TestDynamicTLS: a connection goes to the host that its hello names; and TLS that the waypoint begins is with that host.
func TestDynamicTLS(t *testing.T) {
	t.Parallel()
	l, ca := newLab(t, nil), newAuthority(t, "ca")
	server := ca.serve(2, "a.three.test", tls.NoClientCert)
	l.dynamic("*.three.test", "10.9.0.2", server.Port(), server.Port())
	for _, name := range []string{"a.three.test", "b.three.test", "a.four.test"} {
		named53(name, server.Addr().String())
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for name, ok := range map[string]bool{"a.three.test": true, "A.Three.test": true, "a.four.test": false, "none.three.test": false, "": false} {
		s, err := l.open(t.Context(), "10.9.0.2:443")
		if err != nil {
			t.Fatal(err)
		}
		c := tls.Client(s, &tls.Config{ServerName: name, RootCAs: roots, InsecureSkipVerify: name == ""})
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if err := c.HandshakeContext(t.Context()); (err == nil) != ok {
			t.Errorf("TLS to %q: %v, want success: %v", name, err, ok)
		}
		_ = c.Close()
	}
	l.traffic53("*.three.test", mesh.TrafficSettings{TLS: &mesh.UpstreamTLS{Mode: mesh.TLSSimple, CAPEM: ca.root()}})
	for host, want := range map[string]int{"a.three.test": 200, "b.three.test": 503} {
		if resp, body := l.askFor(host, "http://10.9.0.2/"); resp.StatusCode != want {
			t.Errorf("HTTP to %s, with TLS of the waypoint's: %d %q, want %d", host, resp.StatusCode, body, want)
		}
	}
}

func (l *lab) traffic53(hostname string, s mesh.TrafficSettings) {
	l.t.Helper()
	p := &mesh.TrafficPolicy{Namespace: "shop", Hostname: hostname, Settings: s}
	body, err := wds.EncodeTrafficPolicy(p)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeTrafficPolicy, xds.Resource{Name: p.Key(), Body: body})
	l.eventually("traffic policy known", func() bool {
		var dump struct{ TrafficPolicies []struct{ Hostname string } } // clusters name the host, too, once it was asked
		return json.Unmarshal([]byte(l.page(":15000/config_dump")), &dump) == nil && slices.ContainsFunc(dump.TrafficPolicies,
			func(p struct{ Hostname string }) bool { return p.Hostname == hostname })
	})
}

// TestDynamicNamesAreBounded: clients that make names up are refused before they fill the memory or ask too much at once.
func TestDynamicNamesAreBounded(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	server := named(t, "api")
	l.dynamic("*.five.test", "10.9.0.2", server.Port(), 1)
	release := make(chan struct{})
	zone.mu.Lock()
	zone.wild[".many.five.test."] = server.Addr().String()
	for i := range 64 {
		zone.block[fmt.Sprintf("slow-%d.five.test.", i)] = release
	}
	zone.mu.Unlock()
	var slow sync.WaitGroup
	for i := range 64 {
		slow.Go(func() {
			req, _ := http.NewRequest("GET", "http://10.9.0.2/", nil)
			req.Host = fmt.Sprintf("slow-%d.five.test", i)
			if resp, err := l.client.Do(req); err == nil {
				resp.Body.Close()
			}
		})
	}
	l.eventually("all are asked for", func() bool {
		zone.mu.Lock()
		defer zone.mu.Unlock()
		n := 0
		for i := range 64 {
			if zone.asked[fmt.Sprintf("slow-%d.five.test.", i)] > 0 {
				n++
			}
		}
		return n == 64
	})
	if resp, body := l.askFor("x.many.five.test", "http://10.9.0.2/"); resp.StatusCode != 503 || body != "DNS cache overflow" {
		t.Errorf("with 64 lookups under way: %d %q, want 503 DNS cache overflow", resp.StatusCode, body)
	}
	close(release)
	slow.Wait()
	refused := 0
	start := time.Now()
	for i := range 1100 {
		resp, _ := l.askFor(fmt.Sprintf("n%d.many.five.test", i), "http://10.9.0.2/")
		if resp.StatusCode == 503 {
			refused++
		}
	}
	if took := time.Since(start); took < 9*time.Second && (refused < 70 || refused > 80) { // else some were forgotten meanwhile
		t.Errorf("of 1100 names %d were refused, want those beyond 1024", refused)
	}
	if resp, _ := l.askFor("n1.many.five.test", "http://10.9.0.2/"); resp.StatusCode != 200 {
		t.Errorf("one that is known: %d, want 200", resp.StatusCode)
	}
}
