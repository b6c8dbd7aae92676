package waypoint_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/internal/wds"
	"github.com/mistnet/mistnet/internal/xds"
)

// TestWebSocket with a client and server of golang.org/x/net: messages of all sizes, both ways at once, and its orderly end.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	served := make(chan error, 1)
	ws := websocket.Server{Handler: func(c *websocket.Conn) {
		_ = websocket.Message.Send(c, "welcome to "+c.Request().URL.Path)
		for {
			var msg []byte
			if err := websocket.Message.Receive(c, &msg); err != nil {
				served <- err
				return
			}
			if err := websocket.Message.Send(c, bytes.ToUpper(msg)); err != nil {
				served <- err
				return
			}
		}
	}}
	for vip, proto := range map[string]mesh.AppProtocol{"10.9.0.1": mesh.AppHTTP1, "10.9.0.2": mesh.AppUnknown} {
		l.service("ws"+strings.TrimPrefix(vip, "10.9.0."), vip, proto, app(t, ws.ServeHTTP))
	}
	l.known("ws1", "ws2")
	for _, vip := range []string{"10.9.0.1", "10.9.0.2"} {
		s, err := l.open(t.Context(), vip+":80")
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := websocket.NewConfig("ws://"+vip+"/chat", "http://"+vip)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.SetDeadline(time.Now().Add(20 * time.Second))
		c, err := websocket.NewClient(cfg, s)
		if err != nil {
			t.Fatalf("%s: %v", vip, err)
		}
		c.MaxPayloadBytes = 1 << 21
		var hi string
		if err := websocket.Message.Receive(c, &hi); err != nil || hi != "welcome to /chat" {
			t.Errorf("%s: the server greets %q, %v", vip, hi, err)
		}
		for _, n := range []int{0, 1, 125, 126, 65535, 65536, 1 << 20} {
			sent := bytes.Repeat([]byte("a"), n)
			var got []byte
			if err := websocket.Message.Send(c, sent); err != nil {
				t.Fatalf("%s: send %d bytes: %v", vip, n, err)
			}
			if err := websocket.Message.Receive(c, &got); err != nil || !bytes.Equal(got, bytes.ToUpper(sent)) {
				t.Fatalf("%s: %d bytes come back as %d, %v", vip, n, len(got), err)
			}
		}
		_ = c.Close()
		if err := <-served; err != io.EOF {
			t.Errorf("%s: the server's end is %v, want the end of the connection", vip, err)
		}
	}
}

// dying is an application that answers each request with the first n bytes of a response, then goes.
func dying(t *testing.T, response string, n *atomic.Int64) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				var b [4096]byte
				for head := ""; !strings.Contains(head, "\r\n\r\n"); {
					k, err := conn.Read(b[:])
					if err != nil {
						return
					}
					head += string(b[:k])
				}
				_, _ = io.WriteString(conn, response[:n.Load()])
			}()
		}
	}()
	return addrPort(ln.Addr())
}

// TestAnUpstreamThatDiesAtEachByte of its response: before the head is whole the client is told, behind it the response is cut
// short and never taken for a whole one.
func TestAnUpstreamThatDiesAtEachByte(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	for i, response := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nX-A: b\r\n\r\n0123456789",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n456789\r\n0\r\nX-T: u\r\n\r\n",
		"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n0123456789",
	} {
		var n atomic.Int64
		vip, name := fmt.Sprintf("10.9.0.%d", i+1), fmt.Sprintf("dying%d", i)
		l.service(name, vip, mesh.AppHTTP1, dying(t, response, &n))
		l.known(name)
		head := strings.LastIndex(response, "HTTP/1.1 200") + strings.Index(response[strings.LastIndex(response, "HTTP/1.1 200"):], "\r\n\r\n") + 4
		for ; n.Load() <= int64(len(response)); n.Add(1) {
			at := int(n.Load())
			resp, err := l.client.Get("http://" + vip + "/")
			if err != nil {
				t.Errorf("%q: after %d bytes: %v", response, at, err)
				continue
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			whole := resp.StatusCode == 200 && err == nil && string(body) == "0123456789"
			switch {
			case at < head:
				if resp.StatusCode < 502 || resp.StatusCode > 503 || !strings.Contains(string(body), "reset reason") || resp.Header.Get("Server") != "istio-envoy" {
					t.Errorf("%q: after %d bytes the answer is %d %q, want the waypoint's own", response, at, resp.StatusCode, body)
				}
			case at < len(response) && (err == nil || resp.StatusCode != 200) || at == len(response) && !whole:
				t.Errorf("%q: after %d of %d bytes the answer is %d %q, %v", response, at, len(response), resp.StatusCode, body, err)
			case !strings.HasPrefix("0123456789", string(body)):
				t.Errorf("%q: after %d bytes the body is %q", response, at, body)
			}
		}
	}
}

// TestManyRulesChangeUnderLoad: ten thousand rules, one of which changes again and again while requests go on. None fails, and
// each change arrives.
func TestManyRulesChangeUnderLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.service("other", "10.9.0.2", mesh.AppHTTP1, named(t, "other"))
	l.known("cart", "other")
	rules, changes := 10_000, 5
	if meshtest.Race {
		rules = 1000
	}
	rule := func(i int, name, backend string, match mesh.PathMatch) xds.Resource {
		r := &mesh.Route{
			Kind: mesh.KindVirtualService, Namespace: "shop", Name: name, Protocol: mesh.RouteHTTP, Rule: uint32(i), Created: time.Unix(1, 0).UTC(),
			Parents: []mesh.RouteParent{{Namespace: "shop", Hostname: "cart.shop.svc.cluster.local"}},
			HTTP:    &mesh.HTTPRule{Matches: []mesh.HTTPMatch{{Path: match}}, Backends: []mesh.Backend{to(backend, 1)}},
		}
		body, err := wds.EncodeRoute(r)
		if err != nil {
			t.Fatal(err)
		}
		return xds.Resource{Name: r.Key(), Body: body}
	}
	all := make([]xds.Resource, rules)
	for i := range all {
		all[i] = rule(i, "many", "cart", mesh.PathMatch{Kind: mesh.PathExact, Value: fmt.Sprintf("/item/%d", i)})
	}
	l.publish(mesh.TypeRoute, all...)
	changing := func(backend string) {
		l.publish(mesh.TypeRoute, rule(0, "now", backend, mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/now"}),
			rule(1, "now", backend, mesh.PathMatch{Kind: mesh.PathPrefix, Value: "/"}))
	}
	changing("cart")
	l.eventually("all rules are known", func() bool {
		first, _ := l.get("http://10.9.0.1/item/0")
		last, _ := l.get("http://10.9.0.1/now") // published behind them, and one of many pages is enough to ask for
		return first.StatusCode == 200 && last.StatusCode == 200 && strings.Count(l.page(":15000/config_dump"), `"RuleName"`) == rules+2
	})

	var done atomic.Int64
	var clients sync.WaitGroup
	stop := make(chan struct{})
	for c := range 4 {
		clients.Go(func() {
			for i := c; ; i += 7 {
				select {
				case <-stop:
					return
				default:
				}
				path := fmt.Sprintf("/item/%d", i%rules)
				resp, err := l.client.Get("http://10.9.0.1" + path)
				if err != nil {
					t.Errorf("%s: %v", path, err)
					continue
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK || string(body) != "cart "+path {
					t.Errorf("%s: %d %q, %v, want it served by cart", path, resp.StatusCode, body, err)
				}
				done.Add(1)
			}
		})
	}
	for i := range changes {
		backend := []string{"other", "cart"}[i%2]
		changing(backend)
		before := done.Load()
		l.eventually("the change arrives", func() bool {
			_, body := l.get("http://10.9.0.1/now")
			return strings.HasPrefix(body, backend+" ") && done.Load() > before
		})
	}
	close(stop)
	clients.Wait()
	t.Logf("%d requests during %d changes of %d rules", done.Load(), changes, rules)
}

// TestOneStreamBothWays: what the application says arrives while the client still speaks.
func TestOneStreamBothWays(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		_ = rc.Flush()
		var b [64]byte
		for {
			n, err := r.Body.Read(b[:])
			_, _ = w.Write(bytes.ToUpper(b[:n]))
			_ = rc.Flush()
			if err != nil {
				return
			}
		}
	}))
	l.known("cart")
	s, err := l.open(t.Context(), "10.9.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(20 * time.Second))
	say := func(conn net.Conn, text string) { fmt.Fprintf(conn, "%x\r\n%s\r\n", len(text), text) }
	heard := ""
	hear := func(want string) {
		t.Helper()
		var b [1024]byte
		for !strings.Contains(heard, want) {
			n, err := s.Read(b[:])
			heard += string(b[:n])
			if err != nil {
				t.Fatalf("waiting for %q: %v, heard %q", want, err, heard)
			}
		}
	}
	fmt.Fprint(s, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
	hear("HTTP/1.1 200 OK")
	for _, word := range []string{"one", "two", "three"} {
		say(s, word)
		hear(strings.ToUpper(word))
	}
	fmt.Fprint(s, "0\r\n\r\n")
	hear("0\r\n\r\n")
}
