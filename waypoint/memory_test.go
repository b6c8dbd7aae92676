package waypoint_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
)

// deaf is a server that takes connections and reads nothing.
func deaf(t *testing.T) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", loopback()+":0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all []net.Conn
	go func() { // ends with the listener
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			all = append(all, conn)
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, conn := range all {
			_ = conn.Close()
		}
	})
	return addrPort(ln.Addr())
}

// TestUploadsThatNobodyReads come by a dozen tunnels at once. Together they hold no more than the waypoint lets connections hold, and
// who asks for something else is answered.
func TestUploadsThatNobodyReads(t *testing.T) {
	const limit = 24 << 20
	l := newLab(t, func(c *waypoint.Config) { c.ConnectionMemory = limit >> 20 })
	l.service("hole", "10.9.0.1", mesh.AppTCP, deaf(t))
	l.service("cart", "10.9.0.2", mesh.AppHTTP1, frugal(t))
	l.known("hole", "cart")
	svid := l.ca.SVID(clientID)
	var wg sync.WaitGroup
	piece := make([]byte, 256<<10)
	for range 12 {
		p := hbone.NewPool(hbone.PoolConfig{
			Dial: func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
				return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}).DialContext(ctx, "tcp", addr.String())
			},
			TLS: func(_ context.Context, to hbone.Target) (*tls.Config, error) {
				return identity.ClientConfig(svid, to.Expect), nil
			},
		})
		defer p.Close()
		for range 4 {
			s, err := p.Open(t.Context(), hbone.Target{
				Local: clientID, Addr: netip.AddrPortFrom(netip.MustParseAddr(l.ip), mesh.PortHBONE), Expect: []mesh.Identity{waypointID},
			}, "10.9.0.1:80", hbone.Header{})
			if err != nil {
				continue
			}
			wg.Go(func() {
				_ = s.SetWriteDeadline(time.Now().Add(1500 * time.Millisecond))
				for err := error(nil); err == nil; {
					_, err = s.Write(piece)
				}
			})
		}
	}
	wg.Wait()
	if held := l.gauge("mistnet_connection_memory_bytes"); held < limit/4 || held > limit {
		t.Errorf("connections hold %v bytes, want some of %d", held, limit)
	}
	if got := l.gauge("mistnet_connection_memory_limit_bytes"); got != limit {
		t.Errorf("the limit is told as %v, want %d", got, limit)
	}
	if resp, body := l.get("http://10.9.0.2/"); resp.StatusCode != 200 || body != "hello" {
		t.Errorf("an honest request was answered %d %q", resp.StatusCode, body)
	}
}

// gauge reads a metric without labels.
func (l *lab) gauge(name string) float64 {
	l.t.Helper()
	for line := range strings.Lines(l.page(":15020/metrics")) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				l.t.Fatal(err)
			}
			return n
		}
	}
	l.t.Fatalf("there is no metric %s", name)
	return 0
}
