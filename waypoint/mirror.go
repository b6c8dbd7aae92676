package waypoint

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/http1"
	"github.com/mistnet/mistnet/waypoint/route"
)

// Bounds of mirroring: what is beyond is not mirrored, for nobody waits for a mirror.
const (
	mirrorWorkers = 32
	mirrorQueue   = 256
	mirrorTimeout = 15 * time.Second // of one copy
)

// mirrors sends copies of requests and throws the responses away.
type mirrors struct {
	up    *upstream.Pool
	queue chan mirrored
}

// mirrored is a copy of a request on its way.
type mirrored struct {
	text   []byte // as it goes over the wire
	to     upstream.Pick
	header hbone.Header
	http2  bool
	pool   *mesh.ConnectionPool
}

func newMirrors(up *upstream.Pool) *mirrors {
	return &mirrors{up: up, queue: make(chan mirrored, mirrorQueue)} // a burst; longer queues only make copies late
}

// run sends copies until ctx is done.
func (m *mirrors) run(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	for range mirrorWorkers {
		workers.Go(func() {
			for {
				select {
				case c := <-m.queue:
					m.send(ctx, c)
				case <-ctx.Done():
					return
				}
			}
		})
	}
}

// send makes one exchange. Its failure is nobody's concern.
func (m *mirrors) send(ctx context.Context, c mirrored) {
	ctx, cancel := context.WithTimeout(ctx, mirrorTimeout)
	defer cancel()
	q, err := http1.NewServerConn(&memory{in: bytes.NewReader(c.text)}, http1.Config{}).ReadRequest()
	if err != nil {
		return
	}
	up, err := m.connect(ctx, c)
	if err != nil {
		return
	}
	stop := context.AfterFunc(ctx, up.HangUp)
	c.to.Begin()
	err = discard(up, q)
	c.to.End()
	if !stop() || err != nil {
		up.Close()
		return
	}
	m.up.Put(up)
}

func (m *mirrors) connect(ctx context.Context, c mirrored) (*upstream.Conn, error) {
	if c.http2 {
		return m.up.Stream(ctx, c.to, c.header, c.pool, upstream.ConnectTimeout)
	}
	if up := m.up.Kept(&c.to, false); up != nil {
		return up, nil
	}
	return m.up.Connect(ctx, c.to, c.header)
}

// discard sends a request and reads its response.
func discard(up *upstream.Conn, q *http1.Request) error {
	far := up.Far()
	if err := far.Begin(q, nil); err != nil {
		return err
	}
	if err := far.SendBody(&q.Body); err != nil {
		return err
	}
	for {
		resp, err := far.ReadResponse()
		if err != nil {
			return err
		}
		if resp.Status < 200 {
			continue
		}
		for err == nil {
			_, err = resp.Body.Next()
		}
		if err == io.EOF {
			far.End()
			return nil
		}
		return err
	}
}

// mirror queues copies of the request where its rule and backend ask for them. Only what is here whole is copied: a body
// that is still coming is not waited for.
func (s *session) mirror(p *plan) {
	if len(s.rule.Mirrors)+len(p.backend.Mirrors) == 0 {
		return
	}
	var text []byte
	for _, list := range [...][]route.Mirror{s.rule.Mirrors, p.backend.Mirrors} {
		for i := range list {
			if !list[i].Hit(rand.Uint32()) {
				continue
			}
			c, ok := s.mirrorTo(p, &list[i])
			if !ok {
				continue
			}
			if text == nil {
				if text = s.copied(p); text == nil {
					return
				}
			}
			c.text, c.header = text, s.header()
			select {
			case s.mirrors.queue <- c:
			default:
			}
		}
	}
}

// mirrorTo picks who gets a copy.
func (s *session) mirrorTo(p *plan, m *route.Mirror) (mirrored, bool) {
	key := s.to.cluster(m.Service, &m.Ref)
	if s.trespasses(p, key) != nil {
		return mirrored{}, false
	}
	t := s.view.Target(s.up, key)
	if t == nil {
		return mirrored{}, false
	}
	var search upstream.Search
	search.Begin(s.up, t, &s.client, s.to.addr, "")
	to, ok := search.Next(s.up, time.Now())
	return mirrored{to: to, http2: s.http2(t.App, t.Settings.Pool), pool: t.Settings.Pool}, ok
}

// copied is the request as it will go out, or nil: its body is still coming, or longer than what can be read twice.
func (s *session) copied(p *plan) []byte {
	if kept, err := s.q.Body.Keeps(); err != nil || !kept || s.q.Upgrade != "" || s.q.Continue {
		return nil
	}
	s.log.Attempts = 1
	s.requestEdits(p, time.Time{})
	out := new(memory)
	err := http1.NewClientConn(out, http1.Config{}).WriteRequest(s.q, &s.edits)
	if !s.q.Body.Rewind() || err != nil {
		return nil
	}
	return out.out.Bytes()
}

// memory is a connection to nowhere: it is read from in and written to out.
type memory struct {
	in  *bytes.Reader
	out bytes.Buffer
}

var errNoPeer = errors.New("memory has no other end")

func (m *memory) Read(b []byte) (int, error) {
	if m.in == nil {
		return 0, errNoPeer
	}
	return m.in.Read(b)
}

func (m *memory) Write(b []byte) (int, error)      { return m.out.Write(b) }
func (m *memory) Close() error                     { return nil }
func (m *memory) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (m *memory) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }
