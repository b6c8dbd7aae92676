package http2_test

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mistnet/mistnet/waypoint/http2"
)

// FuzzInterleavings lets one input drive both ends: what the client does and what the upstream does, in any order, each of them
// by the rules, until one of them breaks off. Whatever happens, what reaches a stream of the client is what the upstream said to
// that stream's request, in order and not beyond its end; and when both are gone, nothing is left.
func FuzzInterleavings(f *testing.F) {
	f.Add([]byte{0, 0, 15, 0, 8, 0})                               // a request, its response
	f.Add([]byte{0, 0, 0, 0, 0, 0, 15, 0, 8, 2, 8, 0, 8, 1, 0, 0}) // three, in another order
	f.Add([]byte{1, 0, 2, 9, 15, 0, 7, 0, 9, 50, 3, 0, 9, 5, 10, 0, 15, 0, 0, 0, 15, 0, 8, 0})
	f.Add([]byte{0, 0, 15, 0, 8, 0, 5, 0, 0, 0, 15, 0, 7, 0, 5, 0, 10, 0, 0, 0, 15, 0, 8, 0})
	f.Add([]byte{1, 0, 15, 0, 8, 0, 15, 0, 12, 0, 0, 0, 15, 0, 8, 0}) // answered early
	f.Add([]byte{0, 0, 0, 0, 15, 0, 13, 0, 8, 0, 0, 0, 15, 0, 13, 1})
	f.Add([]byte{0, 0, 15, 0, 11, 0, 8, 0, 0, 0, 15, 200, 15, 200, 0, 0, 15, 0, 13, 2})
	f.Add([]byte{14, 3, 15, 0, 0, 0, 15, 0, 8, 0, 15, 0, 6, 40, 1, 0, 2, 99, 15, 0, 14, 99, 6, 0, 15, 0, 13, 3})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 400 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			b := newCrossfire(t)
			for ; len(input) > 1; input = input[2:] {
				b.do(input[0]%16, int(input[1]))
			}
			b.end()
		})
	})
}

// crossfire is a client and an upstream, who both keep to the rules, and carriers between them.
type crossfire struct {
	t        *testing.T
	down, up *shooter
	client   *http2.ClientConn
	served   sync.WaitGroup
	next     uint32 // the client's next stream
	sending  []uint32
}

// shooter is one of them.
type shooter struct {
	*xhttp2.Framer
	conn *memConn
	enc  *hpack.Encoder
	hbuf strings.Builder

	mu      sync.Mutex
	streams []uint32          // upstream: that ask and are not answered to the end
	asks    map[uint32]string // upstream: who
	begun   map[uint32]bool   // upstream: with a head
	got     map[uint32]string // client: what came
	over    map[uint32]bool   // client: with an end
	reset   map[uint32]bool   // client: by itself
	busy    sync.WaitGroup
}

func newShooter(conn *memConn) *shooter {
	s := &shooter{Framer: xhttp2.NewFramer(conn, conn), conn: conn, asks: map[uint32]string{}, begun: map[uint32]bool{}, got: map[uint32]string{}, over: map[uint32]bool{}, reset: map[uint32]bool{}}
	s.enc = hpack.NewEncoder(&s.hbuf)
	s.AllowIllegalWrites = true
	s.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	return s
}

func (s *shooter) head(stream uint32, end bool, fields ...string) {
	s.hbuf.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = s.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = s.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: stream, EndStream: end, EndHeaders: true, BlockFragment: []byte(s.hbuf.String())})
}

func (s *shooter) listen(note func(f xhttp2.Frame)) {
	s.busy.Go(func() {
		for {
			f, err := s.ReadFrame()
			if err != nil {
				return
			}
			s.mu.Lock()
			note(f)
			s.mu.Unlock()
		}
	})
}

func newCrossfire(t *testing.T) *crossfire {
	near, far := memPipe()
	up, app := memPipe()
	b := &crossfire{t: t, client: http2.NewClientConn(up, http2.Config{}), down: newShooter(near), up: newShooter(app), next: 1}
	server := http2.NewServerConn(far, http2.Config{})
	diary := &diary{}
	b.served.Go(func() { _ = b.client.Run() })
	b.served.Go(func() {
		_ = server.ServeWith(func() http2.Handler { return &carrier{up: b.client, within: time.Minute, diary: diary} })
	})
	_, _ = io.ReadFull(app, make([]byte, len(xhttp2.ClientPreface)))
	_, _ = io.WriteString(near, xhttp2.ClientPreface)
	_ = b.down.WriteSettings()
	_ = b.up.WriteSettings()
	b.up.listen(b.asked)
	b.down.listen(b.answered)
	synctest.Wait()
	return b
}

// asked is the upstream's ear.
func (b *crossfire) asked(f xhttp2.Frame) {
	u, id := b.up, f.Header().StreamID
	switch f := f.(type) {
	case *xhttp2.MetaHeadersFrame:
		if path := f.PseudoValue("path"); path != "" {
			u.streams = append(u.streams, id)
			u.asks[id] = path
		}
	case *xhttp2.DataFrame:
		if text := u.asks[id]; strings.Trim(string(f.Data()), text) != "" {
			b.t.Errorf("the upstream's stream %d, of request %s, gets %q", id, text, f.Data())
		}
	case *xhttp2.RSTStreamFrame:
		b.forget(id)
	}
}

func (b *crossfire) forget(id uint32) {
	for i, s := range b.up.streams {
		if s == id {
			b.up.streams = append(b.up.streams[:i], b.up.streams[i+1:]...)
			return
		}
	}
}

// answered is the client's ear.
func (b *crossfire) answered(f xhttp2.Frame) {
	c, id := b.down, f.Header().StreamID
	if id == 0 || c.reset[id] { // what comes crossed the reset
		return
	}
	want := name(id)
	if c.over[id] {
		if _, reset := f.(*xhttp2.RSTStreamFrame); !reset {
			b.t.Errorf("stream %d gets %v after its end", id, f)
		}
		return
	}
	switch f := f.(type) {
	case *xhttp2.MetaHeadersFrame:
		said := ""
		for _, h := range f.Fields {
			if h.Name == "id" {
				said = h.Value
			}
		}
		own := f.PseudoValue("status") >= "500"
		if !own && said != want || own && said != "" {
			b.t.Errorf("stream %d, of request %s, gets a head with %q: %v", id, want, said, f.Fields)
		}
		c.got[id] += f.PseudoValue("status") + " "
		c.over[id] = f.StreamEnded()
	case *xhttp2.DataFrame:
		if !strings.Contains(c.got[id], "5") && strings.Trim(string(f.Data()), want) != "" {
			b.t.Errorf("stream %d, of request %s, gets %q", id, want, f.Data())
		}
		c.over[id] = f.StreamEnded()
	case *xhttp2.RSTStreamFrame:
		c.over[id] = true
	}
}

// name is what tells a request from others, in bytes that no other's has.
func name(stream uint32) string { return "/" + string(rune('a'+(stream/2)%26)) }

// do does one thing; what is not possible is left out.
func (b *crossfire) do(op byte, n int) {
	id := uint32(0) // of the client
	if len(b.sending) > 0 {
		id = b.sending[n%len(b.sending)]
	}
	stop := func() {
		for i, s := range b.sending {
			if s == id {
				b.sending = append(b.sending[:i], b.sending[i+1:]...)
				return
			}
		}
	}
	switch {
	case op < 2 && b.next < 2*26:
		fields := []string{":method", []string{"GET", "POST"}[op], ":scheme", "http", ":authority", "cart", ":path", name(b.next)}
		b.down.head(b.next, op == 0, fields...)
		if op == 1 {
			b.sending = append(b.sending, b.next)
		}
		b.next += 2
	case op == 2 && id > 0:
		_ = b.down.WriteData(id, false, []byte(strings.Repeat(name(id), n)))
	case op == 3 && id > 0:
		_ = b.down.WriteData(id, true, []byte(strings.Repeat(name(id), n)))
		stop()
	case op == 4 && id > 0:
		b.down.head(id, true, "id", name(id))
		stop()
	case op == 5 && b.next > 1:
		id = uint32(n)%(b.next/2)*2 + 1
		_ = b.down.WriteRSTStream(id, xhttp2.ErrCodeCancel)
		b.down.mu.Lock()
		b.down.reset[id] = true
		b.down.mu.Unlock()
		stop()
	case op == 6 && b.next > 1:
		b.down.mu.Lock()
		over := b.down.over[uint32(n)%(b.next/2)*2+1] || b.down.reset[uint32(n)%(b.next/2)*2+1]
		b.down.mu.Unlock()
		if !over {
			_ = b.down.WriteWindowUpdate(uint32(n)%(b.next/2)*2+1, 1000)
		}
	case op == 14:
		_ = b.down.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingInitialWindowSize, Val: uint32(n)})
	case op == 15:
		synctest.Wait()
		if n > 100 {
			time.Sleep(time.Duration(n-100) * time.Second)
		}
	case op == 13 && n%8 > 0: // one of them breaks off
		switch n % 8 {
		case 1:
			b.up.conn.Close()
		case 2:
			b.down.conn.Close()
		case 3:
			_ = b.up.WriteRawFrame(xhttp2.FramePing, 0, 1, make([]byte, 8))
		}
	default:
		b.answer(op, n)
	}
}

// answer is what the upstream does.
func (b *crossfire) answer(op byte, n int) {
	u := b.up
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.streams) == 0 {
		return
	}
	id := u.streams[n%len(u.streams)]
	text := u.asks[id]
	begin := func() {
		if !u.begun[id] {
			u.head(id, false, ":status", "200", "id", text)
			u.begun[id] = true
		}
	}
	switch op {
	case 7:
		begin()
	case 8: // all at once
		if !u.begun[id] && n > 127 {
			u.head(id, true, ":status", "200", "id", text)
			b.forget(id)
			return
		}
		begin()
		_ = u.WriteData(id, false, []byte(strings.Repeat(text, n)))
		u.head(id, true, "id", text)
		b.forget(id)
	case 9:
		begin()
		_ = u.WriteData(id, false, []byte(strings.Repeat(text, n)))
	case 10:
		begin()
		_ = u.WriteData(id, true, nil)
		b.forget(id)
	case 11:
		if !u.begun[id] {
			u.head(id, false, ":status", "103", "id", text)
		}
	case 12:
		_ = u.WriteRSTStream(id, []xhttp2.ErrCode{xhttp2.ErrCodeNo, xhttp2.ErrCodeRefusedStream, xhttp2.ErrCodeInternal}[n%3])
		b.forget(id)
	case 13:
		_ = u.WriteGoAway(id, xhttp2.ErrCodeNo, nil)
	}
}

// end closes both, and looks what is left.
func (b *crossfire) end() {
	synctest.Wait()
	b.down.conn.Close()
	time.Sleep(time.Second) // for an upload that only has to write
	if _, idle := b.client.Idle(); !idle {
		b.t.Error("streams of the upstream's connection are not given back")
	}
	b.up.conn.Close()
	b.served.Wait()
	b.down.busy.Wait()
	b.up.busy.Wait()
	for id, got := range b.down.got {
		if strings.Count(got, "200") > 1 {
			b.t.Errorf("stream %d: %s", id, fmt.Sprintf("%q", got))
		}
	}
}
