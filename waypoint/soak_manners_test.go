package waypoint_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

// heardBack sends what nobody else does, and expects it back, to the end.
func (s *soak) heardBack(what, id string, in io.Reader, out io.Writer, end func()) {
	text := strings.Repeat(id+" ", 1+rand.IntN(3000))
	go func() { _, _ = io.WriteString(out, text); end() }() // ends with the connection
	if got, err := io.ReadAll(in); err != nil || string(got) != text {
		s.t.Errorf("%s: %d of %d bytes come back, equal: %v, %v", what, len(got), len(text), string(got) == text, err)
	}
	s.count(what)
}

func (s *soak) tcp() {
	conn := s.tunnel("10.9.0.4:80", 20*time.Second)
	if conn == nil {
		return
	}
	defer conn.Close()
	if rand.IntN(3) == 0 {
		_, _ = io.WriteString(conn, "and then nothing")
		_ = conn.Reset()
		return
	}
	s.heardBack("TCP", s.id(), conn, conn, func() { _ = conn.CloseWrite() })
}

func (s *soak) socket1() {
	m := mood{s.id(), "ws", 0}
	conn := s.tunnel("10.9.0.1:80", 20*time.Second)
	if conn == nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "GET "+m.target()+" HTTP/1.1\r\nHost: cart\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "+exampleKey+"\r\n\r\n")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode == 101 && resp.Header.Get("X-Id") != m.id {
		s.t.Errorf("WebSocket: %v, %v", resp, err)
		return
	}
	if resp.StatusCode == 503 { // overflow
		return
	}
	if rand.IntN(3) == 0 {
		_ = conn.Reset()
		return
	}
	s.heardBack("WebSocket", m.id, r, conn, func() { _ = conn.CloseWrite() })
}

func (s *soak) socket2(tr http.RoundTripper) {
	m := mood{s.id(), "ws", 0}
	body, out := io.Pipe()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "CONNECT", "http://10.9.0.1:80"+m.target(), body)
	req.Header[":protocol"] = []string{"websocket"}
	req.Header.Set("Sec-WebSocket-Version", "13")
	resp, err := tr.RoundTrip(req)
	if err != nil {
		s.t.Errorf("WebSocket by HTTP/2: %v", err)
		return
	}
	defer resp.Body.Close()
	defer out.Close()
	if resp.StatusCode == 503 {
		return
	}
	if resp.StatusCode != 200 || resp.Header.Get("X-Id") != m.id {
		s.t.Errorf("WebSocket by HTTP/2: %v", resp)
		return
	}
	if rand.IntN(3) > 0 {
		s.heardBack("WebSocket by HTTP/2", m.id, resp.Body, out, func() { out.Close() })
	}
}

// vandal1 begins a request in HTTP/1.1 and does something else.
func (s *soak) vandal1() {
	conn := s.tunnel(vips[[]string{"one", "two", "unknown"}[rand.IntN(3)]]+":80", 300*time.Millisecond)
	if conn == nil {
		return
	}
	defer conn.Close()
	m := mood{s.id(), []string{"ok", "slow", "never", "cut"}[rand.IntN(4)], rand.IntN(60)}
	text := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", m.target(), len(m.text()), m.text())
	switch rand.IntN(5) {
	case 0: // gone at some byte
		_, _ = io.WriteString(conn, text[:rand.IntN(len(text))])
		_ = conn.Reset()
	case 1:
		_, _ = io.WriteString(conn, text[:rand.IntN(len(text))])
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	case 2: // waits to be told, and then is not there
		_, _ = io.WriteString(conn, strings.Replace(text, "\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n", 1)[:len(text)-len(m.text())+24])
		_, _ = bufio.NewReader(io.LimitReader(conn, 1)).ReadByte()
	case 3: // reads nothing
		_, _ = io.WriteString(conn, strings.Repeat("GET /x?mood=ok&n=63 HTTP/1.1\r\nHost: a\r\n\r\n", 100))
		time.Sleep(10 * time.Millisecond)
	case 4: // no HTTP at all
		_, _ = io.WriteString(conn, "GET \x00\x01\r\n\r\n\r\n")
		_, _ = io.Copy(io.Discard, conn)
	}
	s.count("broken off, HTTP/1.1")
}

// vandal2 speaks HTTP/2 by the rules, more or less, and leaves in the middle of it.
func (s *soak) vandal2() {
	service := []string{"one", "two", "unknown", "wild"}[rand.IntN(4)]
	conn := s.tunnel(vips[service]+":80", 300*time.Millisecond)
	if conn == nil {
		return
	}
	defer conn.Close()
	var block strings.Builder
	enc := hpack.NewEncoder(&block)
	var all strings.Builder
	all.WriteString(xhttp2.ClientPreface)
	fr := xhttp2.NewFramer(&all, nil)
	_ = fr.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: uint32(rand.IntN(3) * 30)})
	for i := range uint32(1 + rand.IntN(20)) {
		m := mood{s.id(), append(fair, foul...)[rand.IntN(len(fair)+len(foul))], rand.IntN(60)}
		if m.what == "kill" && service != "wild" {
			continue
		}
		block.Reset()
		for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":authority", "a"}, {":path", m.target()}} {
			_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		id := 1 + 2*i
		_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, EndHeaders: true, EndStream: rand.IntN(3) == 0, BlockFragment: []byte(block.String())})
		if rand.IntN(2) == 0 {
			_ = fr.WriteData(id, rand.IntN(2) == 0, []byte(m.text()))
		}
		if rand.IntN(3) == 0 {
			_ = fr.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		}
		if rand.IntN(3) == 0 {
			_ = fr.WriteWindowUpdate(id, 1+rand.Uint32N(2000))
		}
	}
	text := all.String()
	if rand.IntN(2) == 0 {
		text = text[:rand.IntN(len(text))]
	}
	go func() { _, _ = io.Copy(io.Discard, conn) }() // ends with the connection
	_, _ = io.WriteString(conn, text)
	time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
	if rand.IntN(2) == 0 {
		_ = conn.Reset()
	}
	s.count("broken off, HTTP/2")
}

// vanishing is a ztunnel that is gone with all of its tunnels.
func (s *soak) vanishing() {
	var raw net.Conn
	svid := s.ca.SVID(clientID)
	pool := hbone.NewPool(hbone.PoolConfig{
		Dial: func(ctx context.Context, addr netip.AddrPort) (conn net.Conn, err error) {
			conn, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}}).DialContext(ctx, "tcp", addr.String())
			raw = conn
			return conn, err
		},
		TLS: func(_ context.Context, to hbone.Target) (*tls.Config, error) {
			return identity.ClientConfig(svid, to.Expect), nil
		},
	})
	defer pool.Close()
	for i := range 6 {
		conn, err := pool.Open(context.Background(), hbone.Target{
			Local: clientID, Addr: netip.AddrPortFrom(netip.MustParseAddr(s.ip), mesh.PortHBONE), Expect: []mesh.Identity{waypointID},
		}, vips[[]string{"one", "two", "bytes"}[i%3]]+":80", hbone.Header{})
		if err != nil {
			s.t.Error(err)
			return
		}
		m := mood{s.id(), []string{"ok", "slow", "never"}[rand.IntN(3)], rand.IntN(60)}
		_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", m.target())
	}
	time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
	_ = raw.(*net.TCPConn).SetLinger(0)
	_ = raw.Close()
	s.count("vanished with six tunnels")
}

// slowly sends a byte at a time.
func (s *soak) slowly() {
	conn := s.tunnel("10.9.0.1:80", 20*time.Second)
	if conn == nil {
		return
	}
	defer conn.Close()
	m := mood{s.id(), "ok", 3}
	for _, b := range []byte(fmt.Sprintf("PUT %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", m.target(), len(m.text()), m.text())) {
		_, _ = conn.Write([]byte{b})
		time.Sleep(time.Millisecond)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		s.t.Errorf("byte by byte: %v", err)
		return
	}
	body, err := io.ReadAll(resp.Body)
	s.judge("one", "PUT", m, resp, string(body), err, true)
}

// tunnel is one to addr, of which nothing is waited for longer; nil: there is none, which is told.
func (s *soak) tunnel(addr string, within time.Duration) *hbone.Stream {
	conn, err := s.open(context.Background(), addr)
	if err != nil {
		s.t.Error(err)
		return nil
	}
	_ = conn.SetDeadline(time.Now().Add(within))
	return conn
}
