package http1_test

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// batched is a connection that can keep what is written, to send it at once.
type batched struct {
	net.Conn
	mu   sync.Mutex
	keep bool
	kept []byte
}

func (b *batched) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.keep {
		return b.Conn.Write(p)
	}
	b.kept = append(b.kept, p...)
	return len(p), nil
}

func (b *batched) send() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, err := b.Conn.Write(b.kept)
	b.keep, b.kept = false, nil
	return err
}

// TestASecondAnswerInsideOfTLS: what an application says in a record of its own behind an answer is read with that from the socket. It is
// given to nobody: the connection carries no other request.
func TestASecondAnswerInsideOfTLS(t *testing.T) {
	t.Parallel()
	cert := meshtest.NewCA(t).Issue(mesh.Identity{}, meshtest.Server("cart"))
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for behind, reusable := range map[string]bool{"": true, answer: false, "H": false} {
			far, near := tcpPair(t)
			wire := &batched{Conn: far}
			app := tls.Server(wire, &tls.Config{Certificates: []tls.Certificate{*cert}, MaxVersion: version})
			go func() {
				var b [1024]byte
				for range 2 {
					if _, err := app.Read(b[:]); err != nil {
						return
					}
					wire.mu.Lock()
					wire.keep = true
					wire.mu.Unlock()
					_, _ = io.WriteString(app, answer)
					if behind != "" {
						_, _ = io.WriteString(app, behind)
					}
					_ = wire.send()
				}
			}()
			up := http1.NewClientConn(tls.Client(near, &tls.Config{InsecureSkipVerify: true}), http1.Config{})
			for i := range 2 {
				if err := up.WriteRequest(request(t, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"), nil); err != nil {
					t.Fatal(err)
				}
				resp, err := up.ReadResponse()
				if err != nil || resp.Status != 200 {
					t.Fatalf("TLS %x, response %d: %v, %v", version, i, resp, err)
				}
				for err == nil {
					_, err = resp.Body.Next()
				}
				if err != io.EOF {
					t.Fatalf("TLS %x, body of response %d: %v", version, i, err)
				}
				if got := up.Reusable(); got != reusable {
					t.Errorf("TLS %x, after an answer and %q: reusable is %v, want %v", version, behind, got, reusable)
				}
				if !reusable {
					break
				}
			}
			_ = up.Close()
			_ = app.Close()
		}
	}
}
