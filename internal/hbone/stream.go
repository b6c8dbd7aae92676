package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// Stream is one tunnelled connection. Half-close maps to END_STREAM; an error of either side's connection maps to
// RST_STREAM with CONNECT_ERROR, as a TCP reset would (RFC 9113, 8.5).
//
// Like any net.Conn it may be used by several goroutines; a Read and a Write do not hinder each other.
type Stream struct {
	c       *conn
	id      uint32
	baggage string // of the answer, client side

	// Guarded by conn.mu.
	sendWindow int
	out        []byte // what Write still has to send; the goroutine that owns it waits
	inFlight   int    // frames of out being encrypted
	queued     bool   // in writer.queue
	sentEnd    bool   // END_STREAM or RST_STREAM sent, or reset by the peer
	gotEnd     bool   // END_STREAM or RST_STREAM received or RST_STREAM sent
	answered   bool   // server: the final answer was sent
	writeErr   error
	writeBy    time.Time
	isReset    bool // by the peer
	onReset    func()

	writing  sync.Mutex // one Write at a time
	reading  sync.Mutex // one Read at a time
	writable chan struct{}
	readable chan struct{}
	writeAt  *time.Timer
	readAt   *time.Timer

	in     inbox
	cancel context.CancelCauseFunc // server: of the handler's context
	kept   bool                    // server: it outlasts the handler; the handler's own
}

func newStream(c *conn, id uint32) *Stream {
	return &Stream{
		c: c, id: id,
		sendWindow: c.peerWindow,
		writable:   make(chan struct{}, 1),
		readable:   make(chan struct{}, 1),
		in:         inbox{window: recvStreamWindow, buffered: &c.buffered, mem: c.mem},
	}
}

func (s *Stream) wakeWriter() {
	select {
	case s.writable <- struct{}{}:
	default:
	}
}

func (s *Stream) wakeReader() {
	select {
	case s.readable <- struct{}{}:
	default:
	}
}

// ResponseBaggage is the baggage of the peer's answer, on the client side; "" if it sent none.
func (s *Stream) ResponseBaggage() string { return s.baggage }

// OnReset has f called once, when the peer has reset the stream, or now if it has: nothing that is written arrives any more, also
// where what came reads to an orderly end (CANCEL, NO_ERROR). Of several calls the last counts; nil takes it back. f must not block:
// it is called on the connection's reader goroutine, or the caller's.
func (s *Stream) OnReset(f func()) {
	s.c.mu.Lock()
	s.onReset = f
	now := s.isReset && f != nil
	s.c.mu.Unlock()
	if now {
		f()
	}
}

// wasReset tells who wants to know.
func (s *Stream) wasReset() {
	s.c.mu.Lock()
	s.isReset = true
	f := s.onReset
	s.onReset = nil
	s.c.mu.Unlock()
	if f != nil {
		f()
	}
}

// Write sends p. It returns when p is encrypted or copied, which the peer's flow control may delay.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	c := s.c
	c.mu.Lock()
	if err := s.writeErrLocked(); err != nil {
		c.mu.Unlock()
		return 0, err
	}
	if len(p) <= stageLimit && s.stageLocked(p) {
		c.send(true)
		return len(p), nil
	}
	s.out = p
	unsent := 0
	var failed error
	for {
		if failed == nil {
			if failed = s.writeErrLocked(); failed != nil {
				unsent, s.out = len(s.out), nil
			}
		}
		if len(s.out) == 0 && s.inFlight == 0 {
			s.out = nil
			c.mu.Unlock()
			return len(p) - unsent, failed
		}
		if len(s.out) > 0 && s.sendWindow > 0 {
			c.w.enqueue(s)
		}
		if !c.w.busy && c.w.pending() && c.err == nil {
			c.w.busy = true
			c.mu.Unlock()
			c.drive(s, true)
			c.mu.Lock()
			continue
		}
		c.mu.Unlock()
		<-s.writable
		c.mu.Lock()
	}
}

// stageLocked copies a small message to the connection's staged frames, if windows and space allow.
func (s *Stream) stageLocked(p []byte) bool {
	w := &s.c.w
	n := len(p)
	if n == 0 {
		return true
	}
	if n > s.sendWindow || n > w.window || len(w.staged)+n > maxStaged {
		return false
	}
	s.sendWindow -= n
	w.window -= n
	w.staged = appendFrameHeader(w.staged, n, http2.FrameData, 0, s.id)
	w.staged = append(w.staged, p...)
	return true
}

func (s *Stream) writeErrLocked() error {
	switch {
	case s.writeErr != nil:
		return s.writeErr
	case s.sentEnd:
		return net.ErrClosed
	case s.c.err != nil:
		return s.c.err
	case !s.writeBy.IsZero() && !time.Now().Before(s.writeBy):
		return os.ErrDeadlineExceeded
	}
	return nil
}

// dropOutLocked fails a waiting Write.
func (s *Stream) dropOutLocked(err error) {
	if s.writeErr == nil {
		s.writeErr = err
	}
	s.wakeWriter()
}

// Read implements net.Conn. RST_STREAM with NO_ERROR or CANCEL reads as io.EOF, as Istio's ztunnel ends a stream nobody
// writes to any more.
func (s *Stream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for {
		n, credit, err := s.in.read(p)
		if n > 0 {
			s.credit(credit)
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		<-s.readable
	}
}

// Ended reports, without waiting, whether the peer has ended its half of the stream or all of it, or has sent what nobody has read
// yet: nothing more can be asked on a stream that was waiting to be used again.
func (s *Stream) Ended() bool {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	return s.in.end || s.in.size > 0
}

// Draining reports whether the stream's connection ends with the streams it has: either side has said so (GOAWAY, RFC 9113, 6.8). What
// is under way goes on; what is to be asked next is better asked on a tunnel of another connection.
func (s *Stream) Draining() bool { return s.c.draining.Load() }

// CloseWrite ends our half of the stream.
func (s *Stream) CloseWrite() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	c := s.c
	c.mu.Lock()
	if s.writeErr != nil || c.err != nil || s.sentEnd {
		err := s.writeErrLocked()
		c.mu.Unlock()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		return err
	}
	s.endLocked()
	c.send(true)
	return nil
}

// endLocked stages END_STREAM.
func (s *Stream) endLocked() {
	s.sentEnd = true
	s.c.w.staged = appendFrameHeader(s.c.w.staged, 0, http2.FrameData, http2.FlagDataEndStream, s.id)
	if s.gotEnd {
		s.c.forgetLocked(s)
	}
}

// Close ends both halves: what was written arrives, what the peer still sends is refused.
func (s *Stream) Close() error {
	s.c.mu.Lock()
	if s.sentEnd && s.gotEnd || s.c.err != nil {
		s.c.mu.Unlock()
	} else {
		waiting := len(s.out) > 0 || s.inFlight > 0 // a Write is cut short, so its end must not look like one
		if !s.sentEnd && !waiting && (s.c.server == nil || s.answered) {
			s.endLocked()
		}
		code := http2.ErrCodeCancel
		if waiting {
			code = http2.ErrCodeConnect
		} else if s.c.server != nil {
			code = http2.ErrCodeNo
		}
		s.resetLocked(code, net.ErrClosed)
		s.c.send(false)
	}
	s.closeReceive(net.ErrClosed)
	return nil
}

// Reset ends both halves so that the peer sees an error, not an end: RST_STREAM with CONNECT_ERROR. Unless both halves
// are over already, when there is nothing left to reset.
func (s *Stream) Reset() error {
	s.reset(http2.ErrCodeConnect)
	return nil
}

func (s *Stream) reset(code http2.ErrCode) {
	err := &ResetError{Code: uint32(code)}
	s.c.mu.Lock()
	s.resetLocked(code, err)
	s.c.send(false)
	s.closeReceive(err)
}

// resetLocked stages RST_STREAM, unless the stream is over or was never known to the peer.
func (s *Stream) resetLocked(code http2.ErrCode, err error) {
	if !(s.sentEnd && s.gotEnd) && s.c.err == nil {
		s.c.w.staged = appendRSTStream(s.c.w.staged, s.id, code)
	}
	s.sentEnd, s.gotEnd = true, true
	s.dropOutLocked(err)
	s.c.forgetLocked(s)
}

// TLS is the state of the connection that carries the stream: who the peer is, as its certificate proved.
func (s *Stream) TLS() tls.ConnectionState { return s.c.state }

// LocalAddr is the tunnel connection's local address.
func (s *Stream) LocalAddr() net.Addr { return s.c.raw.LocalAddr() }

// RemoteAddr is the tunnel connection's remote address.
func (s *Stream) RemoteAddr() net.Addr { return s.c.raw.RemoteAddr() }

// SetDeadline implements net.Conn.
func (s *Stream) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	s.in.readBy = t
	s.readAt = rearm(s.readAt, t, s.wakeReader)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.writeBy = t
	s.writeAt = rearm(s.writeAt, t, s.wakeWriter)
	return nil
}

// rearm makes wake run at t, and now, so that whoever waits looks at the new deadline.
func rearm(timer *time.Timer, t time.Time, wake func()) *time.Timer {
	if timer != nil {
		timer.Stop()
	}
	wake()
	if t.IsZero() {
		return nil
	}
	return time.AfterFunc(time.Until(t), wake)
}
