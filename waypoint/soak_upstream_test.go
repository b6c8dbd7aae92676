package waypoint_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// mood is what a request of the soak asks its application to do with it: /id?mood=cut&n=7. Whatever it does, what it says is the id,
// again and again, so that nobody can take it for the answer to another request.
type mood struct {
	id, what string
	n        int
}

func moodOf(target string) mood {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return mood{id: target}
	}
	n, _ := strconv.Atoi(u.Query().Get("n"))
	return mood{strings.TrimPrefix(u.Path, "/"), u.Query().Get("mood"), n}
}

func (m mood) target() string { return fmt.Sprintf("/%s?mood=%s&n=%d", m.id, m.what, m.n) }

// text is the body of the response.
func (m mood) text() string { return strings.Repeat(m.id+" ", 1+m.n%64) }

// body is that of the request, about n bytes if n is large.
func (m mood) body() string { return strings.Repeat(m.text(), max(1, m.n/len(m.text()))) }

// What a waypoint surely keeps of a request's body to send it again, and more than it may.
const (
	surelyKept = 59 << 10
	notKept    = 70 << 10
)

// lengthen makes some bodies long: most of those no longer than what can be sent again.
func (m *mood) lengthen() {
	switch rand.IntN(30) {
	case 0, 1, 2:
		m.n = rand.IntN(surelyKept)
	case 3:
		m.n = notKept + rand.IntN(notKept)
	}
}

// soakApps are the applications of a soak, with what they own.
type soakApps struct {
	t     *testing.T
	quit  chan struct{}
	work  sync.WaitGroup
	mu    sync.Mutex
	conns map[net.Conn]bool
	slow  chan struct{} // told of each request that is to be slow; nil: nobody listens
	go_   chan struct{} // closed when those may be answered
}

func newSoakApps(t *testing.T) *soakApps {
	return &soakApps{t: t, quit: make(chan struct{}), conns: make(map[net.Conn]bool), slow: make(chan struct{}, 1000), go_: make(chan struct{})}
}

// serve accepts connections until close.
func (a *soakApps) serve(handle func(conn *net.TCPConn)) netip.AddrPort {
	ln := listen(a.t, loopback()+":0")
	a.work.Go(func() { <-a.quit; ln.Close() })
	a.work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			a.mu.Lock()
			a.conns[conn] = true
			a.mu.Unlock()
			a.work.Go(func() {
				handle(conn.(*net.TCPConn))
				conn.Close()
				a.mu.Lock()
				delete(a.conns, conn)
				a.mu.Unlock()
			})
		}
	})
	return addrPort(ln.Addr())
}

func (a *soakApps) close() {
	close(a.quit)
	a.mu.Lock()
	for c := range a.conns {
		c.Close()
	}
	a.mu.Unlock()
	a.work.Wait()
}

// pause lasts as long as a slow answer takes.
func (a *soakApps) pause(m mood) {
	if m.what == "held" {
		a.slow <- struct{}{}
		select {
		case <-a.go_:
		case <-a.quit:
		}
		return
	}
	select {
	case <-time.After(time.Duration(m.n%20) * time.Millisecond):
	case <-a.quit:
	}
}

// silent takes all and says nothing.
func (a *soakApps) silent(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) }

// sendBack sends what comes back, but not by splice(2), for which package net keeps pipes until the collector takes them: they would be
// counted as left.
func sendBack(conn io.Writer, r io.Reader) {
	_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{r})
}

// echo is no HTTP.
func (a *soakApps) echo(conn *net.TCPConn) {
	sendBack(conn, conn)
	_ = conn.CloseWrite()
}

// one is an application of HTTP/1.1.
func (a *soakApps) one(conn *net.TCPConn) {
	r := bufio.NewReader(conn)
	for {
		q, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		m := moodOf(q.RequestURI)
		var whole bytes.Buffer
		fmt.Fprintf(&whole, "HTTP/1.1 200 OK\r\nX-Id: %s\r\nTransfer-Encoding: chunked\r\nTrailer: X-Id-End\r\n\r\n", m.id)
		if q.Method != "HEAD" {
			fmt.Fprintf(&whole, "%x\r\n%s\r\n0\r\nX-Id-End: %s\r\n\r\n", len(m.text()), m.text(), m.id)
		}
		switch m.what {
		case "early":
			_, _ = conn.Write(whole.Bytes())
			return
		case "ws":
			if q.Header.Get("Upgrade") == "websocket" {
				fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Id: %s\r\nSec-WebSocket-Accept: %s\r\n\r\n",
					m.id, acceptKey(q.Header.Get("Sec-WebSocket-Key")))
				sendBack(conn, r)
				_ = conn.CloseWrite()
				return
			}
		case "reset": // at each byte of its head
			_ = conn.SetLinger(0)
			return
		}
		body, err := io.ReadAll(q.Body)
		if err != nil {
			return
		}
		if len(body) > 0 && string(body) != m.body() {
			a.t.Errorf("%s is asked with a body of %d bytes, %.80q", q.RequestURI, len(body), body)
		}
		switch m.what {
		case "never":
			_, _ = r.ReadByte() // until the waypoint has enough
			return
		case "cut":
			_, _ = conn.Write(whole.Bytes()[:m.n%(whole.Len()+1)])
			if m.n%2 == 0 {
				_ = conn.SetLinger(0)
			}
			return
		case "503":
			fmt.Fprintf(conn, "HTTP/1.1 503 Service Unavailable\r\nX-Id: %s\r\nContent-Length: %d\r\n\r\n", m.id, len(m.text()))
			if q.Method != "HEAD" {
				_, _ = io.WriteString(conn, m.text())
			}
			continue
		case "interim":
			fmt.Fprintf(conn, "HTTP/1.1 103 Early Hints\r\nLink: </%s>\r\n\r\n", m.id)
		case "slow", "held":
			a.pause(m)
		case "pieces":
			for _, b := range whole.Bytes() {
				_, _ = conn.Write([]byte{b})
			}
			continue
		}
		if _, err := conn.Write(whole.Bytes()); err != nil || m.what == "close" {
			return
		}
	}
}

// app2conn is a connection to an application of HTTP/2.
type app2conn struct {
	*soakApps
	conn *net.TCPConn
	mu   sync.Mutex
	fr   *xhttp2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer
	asks map[uint32]mood
	got  map[uint32]string
	last uint32 // that is looked at, once it goes away
}

// two is an application of HTTP/2, frame by frame.
func (a *soakApps) two(conn *net.TCPConn) {
	c := &app2conn{soakApps: a, conn: conn, fr: xhttp2.NewFramer(conn, bufio.NewReader(conn)), asks: map[uint32]mood{}, got: map[uint32]string{}}
	c.enc = hpack.NewEncoder(&c.buf)
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.ReadFull(conn, make([]byte, len(xhttp2.ClientPreface))); err != nil {
		return
	}
	_ = c.fr.WriteSettings()
	var work sync.WaitGroup
	defer work.Wait()
	for {
		f, err := c.fr.ReadFrame()
		if err != nil {
			if _, ok := errors.AsType[xhttp2.StreamError](err); ok {
				a.t.Errorf("the waypoint sends %v", err)
			}
			return
		}
		id := f.Header().StreamID
		switch f := f.(type) {
		case *xhttp2.SettingsFrame:
			if !f.IsAck() {
				c.write(func() { _ = c.fr.WriteSettingsAck() })
			}
		case *xhttp2.PingFrame:
			c.write(func() { _ = c.fr.WritePing(true, f.Data) })
		case *xhttp2.MetaHeadersFrame:
			if c.last > 0 && id > c.last {
				continue
			}
			if target := f.PseudoValue("path"); target != "" {
				m := moodOf(target)
				c.asks[id] = m
				if m.what == "early" && !f.StreamEnded() {
					c.answer(id, m)
					c.write(func() { _ = c.fr.WriteRSTStream(id, xhttp2.ErrCodeNo) })
					delete(c.asks, id)
				}
			}
			if f.StreamEnded() {
				c.whole(id, &work)
			}
		case *xhttp2.DataFrame:
			if n := f.Header().Length; n > 0 {
				c.write(func() {
					_ = c.fr.WriteWindowUpdate(0, n)
					if _, ok := c.asks[id]; ok && !f.StreamEnded() {
						_ = c.fr.WriteWindowUpdate(id, n)
					}
				})
			}
			if _, ok := c.asks[id]; ok {
				c.got[id] += string(f.Data())
			}
			if f.StreamEnded() {
				c.whole(id, &work)
			}
		case *xhttp2.RSTStreamFrame:
			delete(c.asks, id)
			delete(c.got, id)
		}
	}
}

func (c *app2conn) write(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *app2conn) head(id uint32, end bool, fields ...string) {
	c.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = c.fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, EndStream: end, EndHeaders: true, BlockFragment: c.buf.Bytes()})
}

// answer sends all of an answer.
func (c *app2conn) answer(id uint32, m mood) {
	c.write(func() {
		c.head(id, false, ":status", "200", "x-id", m.id)
		_ = c.fr.WriteData(id, false, []byte(m.text()))
		c.head(id, true, "x-id-end", m.id)
	})
}

// whole is called when a request is.
func (c *app2conn) whole(id uint32, work *sync.WaitGroup) {
	m, ok := c.asks[id]
	if !ok {
		return
	}
	if body := c.got[id]; body != "" && body != m.body() {
		c.t.Errorf("%s is asked with a body of %d bytes, %.80q", m.target(), len(body), body)
	}
	delete(c.asks, id)
	delete(c.got, id)
	reset := func(code xhttp2.ErrCode) { c.write(func() { _ = c.fr.WriteRSTStream(id, code) }) }
	switch m.what {
	case "never":
	case "reset":
		reset(xhttp2.ErrCodeInternal)
	case "refused":
		reset(xhttp2.ErrCodeRefusedStream)
	case "cut":
		c.write(func() {
			c.head(id, false, ":status", "200", "x-id", m.id)
			_ = c.fr.WriteData(id, false, []byte(m.text()[:m.n%len(m.text())]))
		})
		reset(xhttp2.ErrCodeInternal)
	case "kill":
		_ = c.conn.SetLinger(0)
		c.conn.Close()
	case "503":
		c.write(func() {
			c.head(id, false, ":status", "503", "x-id", m.id)
			_ = c.fr.WriteData(id, true, []byte(m.text()))
		})
	case "close": // in good order: nothing above this was looked at
		c.answer(id, m)
		if c.last == 0 || id < c.last {
			c.last = id
		}
		c.write(func() { _ = c.fr.WriteGoAway(c.last, xhttp2.ErrCodeNo, nil) })
		for later := range c.asks {
			if later > c.last {
				delete(c.asks, later)
			}
		}
	case "interim":
		c.write(func() { c.head(id, false, ":status", "103", "link", "</"+m.id+">") })
		c.answer(id, m)
	case "slow", "held":
		work.Go(func() {
			c.pause(m)
			c.answer(id, m)
		})
	case "pieces":
		c.write(func() { c.head(id, false, ":status", "200", "x-id", m.id) })
		for _, b := range []byte(m.text()) {
			c.write(func() { _ = c.fr.WriteData(id, false, []byte{b}) })
		}
		c.write(func() { c.head(id, true, "x-id-end", m.id) })
	default:
		c.answer(id, m)
	}
}
