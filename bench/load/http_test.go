package load_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/internal/relay"
)

// orders are one of every kind of HTTP slice.
var orders = []load.Order{
	{Kind: load.HTTP1, Conns: 4},
	{Kind: load.HTTP1, Conns: 2, Body: 64 << 10},
	{Kind: load.HTTP1, Conns: 2, Once: true},
	{Kind: load.Paced, Conns: 4, Rate: 500},
	{Kind: load.HTTP2, Conns: 3, Streams: 1},
	{Kind: load.HTTP2, Conns: 1, Streams: 32},
	{Kind: load.GRPC, Conns: 1, Streams: 32},
	{Kind: load.GRPC, Conns: 3, Streams: 1, Once: true},
	{Kind: load.Idle, Conns: 200},
}

func run(t *testing.T, o load.Order) load.Report {
	t.Helper()
	o.Warm, o.Slice, o.PIDs, o.Host, o.Path = 10*time.Millisecond, 100*time.Millisecond, []int{os.Getpid()}, "app.test", "/some/where"
	return load.Run(t.Context(), o)
}

func check(t *testing.T, o load.Order, r load.Report) {
	t.Helper()
	name := fmt.Sprintf("%s on %d connections, %d streams, body %d, once %v", o.Kind, o.Conns, o.Streams, o.Body, o.Once)
	if r.Error != "" || r.Ops < int64(o.Conns) {
		t.Errorf("%s: %+v, want operations and no error", name, r)
		return
	}
	if o.Once || o.Kind == load.Idle {
		return
	}
	body := int64(max(o.Body, load.AnswerBytes))
	if o.Kind == load.GRPC {
		body = 2 * (5 + 16)
	} else if o.Body > 0 {
		body *= 2
	}
	if r.Bytes != r.Ops*body {
		t.Errorf("%s: %d bytes in %d exchanges, want %d each", name, r.Bytes, r.Ops, body)
	}
	if r.P50 <= 0 || r.P99 < r.P50 || r.Elapsed < 100*time.Millisecond {
		t.Errorf("%s: p50 %v, p99 %v in %v", name, r.P50, r.P99, r.Elapsed)
	}
}

func TestEveryKindOfHTTPSlice(t *testing.T) {
	addr := serve(t)
	for _, o := range orders {
		o.Addr = addr
		r := run(t, o)
		check(t, o, r)
		if o.Kind == load.Paced && (r.Ops < 20 || r.Ops > 80) {
			t.Errorf("paced: %d requests in 100 ms at 500 a second", r.Ops)
		}
	}
}

// The standard library must understand our server and our clients, with a proxy of its own between them.
func TestHTTPOfOthers(t *testing.T) {
	addr := serve(t)
	to, err := url.Parse("http://" + addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, two := range []bool{false, true} {
		tr := &http.Transport{MaxIdleConnsPerHost: 64, Protocols: new(http.Protocols)}
		tr.Protocols.SetHTTP1(!two)
		tr.Protocols.SetUnencryptedHTTP2(two)
		proxy := httptest.NewUnstartedServer(&httputil.ReverseProxy{
			Transport: tr, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) },
		})
		proxy.Config.Protocols = new(http.Protocols)
		proxy.Config.Protocols.SetHTTP1(true)
		proxy.Config.Protocols.SetUnencryptedHTTP2(true)
		proxy.Start()
		defer proxy.Close()
		defer tr.CloseIdleConnections()
		for _, o := range orders {
			if isTwo := o.Kind == load.HTTP2 || o.Kind == load.GRPC; isTwo != two {
				continue
			}
			o.Addr = proxy.Listener.Addr().String()
			check(t, o, run(t, o))
		}
	}
}

func TestAnAnswerThatIsNoSuccessIsAnError(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Content-Type") == "application/grpc" {
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "14")
			return
		}
		w.WriteHeader(503)
	}))
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	defer srv.Close()
	for _, o := range orders {
		o.Addr = srv.Listener.Addr().String()
		if r := run(t, o); r.Error == "" {
			t.Errorf("%s against a server that fails: %+v, want an error", o.Kind, r)
		}
	}
}

// TestTheServersConnectionWindow: with a small window of the client's, answers wait for it and all come.
func TestTheServersConnectionWindow(t *testing.T) {
	conn, err := net.Dial("tcp", serve(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f := http2.NewFramer(conn, conn)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	const requests = 100 // of 1 KB each, over a window of 64 KB
	for i := range uint32(requests) {
		// :method GET, :scheme http, :path /, of the static table
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1 + 2*i, BlockFragment: []byte{0x82, 0x86, 0x84}, EndStream: true, EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
	}
	ended, window := 0, 65535
	for ended < requests {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("after %d answers: %v", ended, err)
		}
		d, ok := frame.(*http2.DataFrame)
		if !ok {
			continue
		}
		if window -= len(d.Data()); window < 0 {
			t.Fatal("the server sent more than it may")
		}
		if d.StreamEnded() {
			ended++
		}
		if window < 2048 {
			if err := f.WriteWindowUpdate(0, 60000); err != nil {
				t.Fatal(err)
			}
			window += 60000
		}
	}
}

// TestThroughATunnel: all connections of an order go over one HBONE connection.
func TestThroughATunnel(t *testing.T) {
	app := serve(t)
	ca := meshtest.NewCA(t)
	id := func(account string) mesh.Identity {
		return mesh.Identity{TrustDomain: "cluster.local", Namespace: "bench", ServiceAccount: account}
	}
	server := &hbone.Server{TLS: identity.ServerConfig(ca.SVID(id("server"))), Log: zap.NewNop(), Handle: func(ctx context.Context, r *hbone.Request) {
		up, err := net.Dial("tcp", app)
		if err != nil {
			t.Error(err)
			return
		}
		s, err := r.Accept("")
		if err != nil {
			t.Error(err)
			return
		}
		if r.Authority != "10.9.0.1:80" {
			t.Errorf("authority is %q", r.Authority)
		}
		_ = relay.Pump(ctx, s, up.(*net.TCPConn), new(relay.Counters))
	}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			accepted++
			go func() { _ = server.ServeConn(t.Context(), c) }()
		}
	}()
	dir := t.TempDir()
	leaf := ca.Issue(id("client"))
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var chain strings.Builder
	for _, der := range leaf.Certificate {
		chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	tunnel := &load.Tunnel{
		Authority: "10.9.0.1:80", Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key"), Root: filepath.Join(dir, "root"),
		Local: id("client").String(), Expect: id("server").String(),
	}
	for path, text := range map[string][]byte{
		tunnel.Cert: []byte(chain.String()), tunnel.Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), tunnel.Root: ca.RootPEM(),
	} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o := load.Order{Kind: load.HTTP1, Conns: 16, Addr: ln.Addr().String(), Tunnel: tunnel}
	check(t, o, run(t, o))
	ln.Close()
	<-done
	if accepted != 1 {
		t.Errorf("%d connections, want one for all", accepted)
	}
}

func TestParseMemory(t *testing.T) {
	const text = "00400000-7ffd [rollup]\nRss:  900 kB\nPss:  800 kB\nPss_Anon:  321 kB\nPss_File: 2 kB\n"
	if n, err := load.ParseMemory(text); err != nil || n != 321<<10 {
		t.Errorf("ParseMemory = %d, %v, want %d", n, err, 321<<10)
	}
	if _, err := load.ParseMemory("Rss: 1 kB\n"); err == nil {
		t.Error("ParseMemory without the line succeeded")
	}
}
