//lint:file-ignore SA1019 the implementation of golang.org/x/net is the peer here, deprecated or not

package hbone_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone"
)

// The engines of golang.org/x/net are strangers to ours: what both sides understand is HTTP/2.

func TestXNetClientTunnelsThroughOurServer(t *testing.T) {
	addr := serve(t, &hbone.Server{Handle: echo})
	tr := &http2.Transport{TLSClientConfig: clientTLS()}
	defer tr.CloseIdleConnections()
	for _, size := range []int{0, 1, 100_000, 20 << 20} {
		want := random(size)
		pr, pw := io.Pipe()
		req := &http.Request{
			Method: "CONNECT", Host: "10.0.0.1:80", Body: pr, Header: http.Header{"Baggage": {"a=b"}},
			URL: &url.URL{Scheme: "https", Host: addr.String()},
		}
		resp, err := tr.RoundTrip(req)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("RoundTrip: %v, %v", resp, err)
		}
		var sent sync.WaitGroup
		sent.Go(func() {
			pw.Write(want)
			pw.Close()
		})
		got, err := io.ReadAll(resp.Body)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("echo of %d bytes = %d bytes, %v", size, len(got), err)
		}
		sent.Wait()
	}
}

func TestOurClientTunnelsThroughXNetServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "CONNECT" || r.Host != "10.0.0.1:80" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		buf := make([]byte, 64<<10)
		for {
			n, err := r.Body.Read(buf)
			w.Write(buf[:n])
			w.(http.Flusher).Flush()
			if err != nil {
				return
			}
		}
	})
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				tc := tls.Server(c, serverTLS())
				defer tc.Close()
				if tc.Handshake() == nil {
					new(http2.Server).ServeConn(tc, &http2.ServeConnOpts{Handler: handler})
				}
			})
		}
	})
	p := newPool(t, nil)
	t.Cleanup(func() { ln.Close(); p.Close(); conns.Wait() })
	addr := ln.Addr().(*net.TCPAddr).AddrPort()
	for _, size := range []int{0, 1, 100_000, 20 << 20} {
		s := open(t, p, addr)
		want := random(size)
		var sent sync.WaitGroup
		sent.Go(func() {
			s.Write(want)
			s.CloseWrite()
		})
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("echo of %d bytes = %d bytes, %v", size, len(got), err)
		}
		sent.Wait()
		s.Close()
	}
	if _, err := p.Open(t.Context(), target(addr), "10.0.0.9:80", hbone.Header{}); err == nil || !strings.Contains(err.Error(), "400") {
		t.Errorf("Open of another authority = %v, want status 400", err)
	}
}

// writePEM writes the client's certificate, key and root for programs that want files.
func writePEM(t *testing.T) (cert, key, root string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, typ string, der []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := sharedPKI()
	keyDER, err := x509.MarshalPKCS8PrivateKey(p.client.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return write("cert.pem", "CERTIFICATE", p.client.Certificate[0]), write("key.pem", "PRIVATE KEY", keyDER),
		write("root.pem", "CERTIFICATE", p.rootDER)
}

// curlServer answers GET as a wrong method and lets tunnels reach an HTTP server.
func curlServer(t *testing.T) (addr, web string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello from the pod") })}
	var work sync.WaitGroup
	work.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() { srv.Close(); work.Wait() })
	a := serve(t, &hbone.Server{Handle: func(ctx context.Context, r *hbone.Request) {
		if r.Method != "CONNECT" {
			r.Reject(400)
			return
		}
		app, err := net.Dial("tcp", r.Authority)
		if err != nil {
			r.Reject(503)
			return
		}
		defer app.Close()
		s, err := r.Accept("")
		if err != nil {
			return
		}
		var up sync.WaitGroup
		up.Go(func() { io.Copy(app, s) })
		io.Copy(s, app)
		s.CloseWrite()
		up.Wait()
	}})
	return a.String(), ln.Addr().String()
}

func TestCurlSpeaksToOurServer(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("optional program curl is not installed")
	}
	cert, key, root := writePEM(t)
	addr, web := curlServer(t)
	out, err := exec.CommandContext(t.Context(), curl, "-sS", "--http2", "--max-time", "10", "-o", "/dev/null",
		"-w", "%{http_version} %{http_code}", "--cert", cert, "--key", key, "--cacert", root, "https://"+addr+"/").CombinedOutput()
	if err != nil || string(out) != "2 400" {
		t.Fatalf("curl of a page = %q, %v; want HTTP/2 and status 400", out, err)
	}
	help, _ := exec.CommandContext(t.Context(), curl, "--help", "all").Output()
	if !bytes.Contains(help, []byte("--proxy-http2")) {
		t.Logf("this curl has no --proxy-http2, so it cannot open a tunnel")
		return
	}
	out, err = exec.CommandContext(t.Context(), curl, "-sS", "--max-time", "10", "--proxytunnel", "--proxy-http2", "--proxy", "https://"+addr,
		"--proxy-cert", cert, "--proxy-key", key, "--proxy-cacert", root, "http://"+web+"/").CombinedOutput()
	if err != nil || string(out) != "hello from the pod" {
		t.Fatalf("curl through the tunnel = %q, %v", out, err)
	}
}
