package waypoint_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/waypoint"
)

// stream publishes a rule for connections of a service.
func (l *lab) stream(service, name string, protocol mesh.RouteProtocol, to string, m mesh.StreamMatch) {
	l.t.Helper()
	host := service + ".shop.svc.cluster.local"
	r := &mesh.Route{
		Kind: mesh.KindVirtualService, Namespace: "shop", Name: name, Protocol: protocol, Created: time.Unix(1, 0).UTC(),
		Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: host}},
		Stream: &mesh.StreamRule{Matches: []mesh.StreamMatch{m}, Backends: []mesh.Backend{{
			Ref: mesh.BackendRef{Namespace: "shop", Hostname: to + ".shop.svc.cluster.local"}, Weight: 1,
		}}},
	}
	body, err := wds.EncodeRoute(r)
	if err != nil {
		l.t.Fatal(err)
	}
	l.publish(mesh.TypeRoute, xds.Resource{Name: r.Key(), Body: body})
	l.eventually("route known", func() bool { return strings.Contains(l.page(":15000/config_dump"), `"Name": "`+name+`"`) })
}

// tlsApp says its name in TLS.
func tlsApp(t *testing.T, ca *meshtest.CA, name string) netip.AddrPort {
	t.Helper()
	cert := ca.Issue(mesh.Identity{}, meshtest.Server("a.example", "b.example", "c.example"))
	ln := tls.NewListener(listen(t, loopback()+":0"), &tls.Config{Certificates: []tls.Certificate{*cert}})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.WriteString(c, name) }()
		}
	}()
	return addrPort(ln.Addr())
}

// dribble sends what is written a few bytes at a time, each by itself.
type dribble struct{ net.Conn }

func (d dribble) Write(b []byte) (int, error) {
	for i := 0; i < len(b); i += 200 {
		if _, err := d.Conn.Write(b[i:min(i+200, len(b))]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// TestARequestThatComesInPiecesIsOne: who has begun a request is not taken for silent, or the rest of it would pass unseen.
func TestARequestThatComesInPiecesIsOne(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 20 * time.Millisecond })
	l.service("cart", "10.9.0.1", mesh.AppUnknown, named(t, "cart"))
	l.routes(mesh.KindVirtualService, mesh.HTTPRule{Direct: &mesh.DirectResponse{Status: 418}})
	l.known("cart")
	l.eventually("the rule is there", func() bool {
		l.client.CloseIdleConnections() // one whose beginning came late is no HTTP to its end
		resp, _ := l.get(cart + "/")
		return resp.StatusCode == 418
	})
	l.eventually("a request in pieces meets the rule", func() bool { // on a busy machine its first one may come late, too
		s, err := l.open(t.Context(), "10.9.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		pieces := time.NewTicker(60 * time.Millisecond)
		defer pieces.Stop()
		for _, piece := range []string{"G", "ET / HT", "TP/1.1\r\nhost: cart\r\n\r\n"} {
			if _, err := io.WriteString(s, piece); err != nil {
				return false
			}
			<-pieces.C
		}
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		var b [64]byte
		n, _ := s.Read(b[:])
		return strings.HasPrefix(string(b[:n]), "HTTP/1.1 418")
	})
}

// TestTLSGoesByTheNameItAsksFor, on a port that is said to carry TLS and on one of unknown protocol, and stays sealed.
func TestTLSGoesByTheNameItAsksFor(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 5 * time.Second })
	a, b := tlsApp(t, l.ca, "a"), tlsApp(t, l.ca, "b")
	for vip, app := range map[string]mesh.AppProtocol{"10.9.0.1": mesh.AppTLS, "10.9.0.2": mesh.AppUnknown} {
		name := "svc" + strings.TrimPrefix(vip, "10.9.0.")
		l.service(name, vip, app, a)
		l.stream(name, name+"-1", mesh.RouteTLS, "other", mesh.StreamMatch{SNI: []string{"b.example"}})
		l.stream(name, name+"-2", mesh.RouteTLS, name, mesh.StreamMatch{SNI: []string{"*.example"}, Sources: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Destinations: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}})
	}
	l.service("other", "10.9.0.9", mesh.AppTLS, b)
	l.known("svc1", "svc2", "other")
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(l.ca.RootPEM())
	ask := func(authority, name string) string {
		s, err := l.open(t.Context(), authority)
		if err != nil {
			return err.Error()
		}
		defer s.Close()
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		c := tls.Client(dribble{s}, &tls.Config{RootCAs: roots, ServerName: name})
		text, err := io.ReadAll(c)
		if err != nil {
			return "closed"
		}
		return string(text)
	}
	for _, c := range []struct{ authority, name, want string }{
		{"10.9.0.1:80", "a.example", "a"}, {"10.9.0.1:80", "b.example", "b"}, {"10.9.0.1:80", "c.example", "a"},
		{"10.9.0.1:80", "elsewhere.test", "closed"},
		{"10.9.0.2:80", "a.example", "a"}, {"10.9.0.2:80", "b.example", "b"},
		{"svc1.shop.svc.cluster.local:80", "b.example", "b"}, {"svc1.shop.svc.cluster.local:80", "a.example", "a"},
		{"10.9.0.9:80", "a.example", "b"}, // a service without such rules
	} {
		if got := ask(c.authority, c.name); got != c.want {
			t.Errorf("TLS to %s for %s reaches %q, want %q", c.authority, c.name, got, c.want)
		}
	}
	l.eventually("access log", func() bool { return strings.Contains(l.log.String(), `"requested_server_name":"b.example"`) })
}

// TestProtocolsOfDatabasesAndQueues pass a port of unknown protocol untouched, whoever speaks first.
func TestProtocolsOfDatabasesAndQueues(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	cases := []struct{ name, client, server string }{ // what each says first; "": it waits
		{"mysql", "", "\x4a\x00\x00\x00\x0a8.0.36\x00\x08\x00\x00\x00\x3a\x23\x3d\x4b\x43\x4a\x2e\x43\x00\xff\xff\xff\x02\x00\xff\xdf\x15"},
		{"smtp", "", "220 mail.example ESMTP ready\r\n"},
		{"ssh", "SSH-2.0-OpenSSH_9.6\r\n", "SSH-2.0-OpenSSH_9.6\r\n"},
		{"mongodb", "\x35\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\xd4\x07\x00\x00\x00\x00\x00\x00admin.$cmd\x00\x00\x00\x00\x00\xff\xff\xff\xff\x0e\x00\x00\x00\x10hello\x00\x01\x00\x00\x00\x00", "\x10\x00\x00\x00"},
		{"amqp", "AMQP\x00\x00\x09\x01", "\x01\x00\x00\x00\x00\x01\x0a\x00\x0a"},
		{"redis", "*1\r\n$4\r\nPING\r\n", "+PONG\r\n"},
		{"redis inline", "PING\r\n", "+PONG\r\n"},
		{"postgresql", "\x00\x00\x00\x08\x04\xd2\x16\x2f", "S"},
		{"kafka", "\x00\x00\x00\x1a\x00\x12\x00\x03\x00\x00\x00\x01", "\x00\x00\x00\x04\x00\x00\x00\x01"},
		{"a letter as HTTP's", "P", "what?"},
		{"a byte as TLS's", "\x16\x04", "what?"},
	}
	for i, c := range cases {
		vip := "10.9.1." + string('1'+byte(i/10)) + string('0'+byte(i%10))
		name := "db" + string('a'+byte(i))
		heard := make(chan []byte, 1)
		ln := listen(t, loopback()+":0")
		go func() {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			if c.client == "" {
				_, _ = io.WriteString(conn, c.server)
			}
			got := make([]byte, len(c.client))
			_, _ = io.ReadFull(conn, got)
			if c.client != "" {
				_, _ = io.WriteString(conn, c.server)
			}
			rest, _ := io.ReadAll(conn)
			heard <- append(got, rest...)
		}()
		l.service(name, vip, mesh.AppUnknown, addrPort(ln.Addr()))
		l.known(name)
		s, err := l.open(t.Context(), vip+":80")
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		_ = s.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.WriteString(s, c.client)
		got := make([]byte, len(c.server))
		if _, err := io.ReadFull(s, got); err != nil || string(got) != c.server {
			t.Errorf("%s: the client hears %q, %v, want %q", c.name, got, err, c.server)
		}
		_, _ = io.WriteString(s, "more")
		_ = s.CloseWrite()
		if got := <-heard; !bytes.Equal(got, []byte(c.client+"more")) {
			t.Errorf("%s: the server hears %q, want %q", c.name, got, c.client+"more")
		}
		s.Close()
	}
}
