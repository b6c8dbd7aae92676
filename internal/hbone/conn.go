package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone/record"
	"github.com/mistnet/mistnet/internal/memlimit"
)

const (
	pingInterval = 10 * time.Second
	pingTimeout  = 20 * time.Second
	closeTimeout = time.Second // for the last GOAWAY of a failing connection
)

// conn is one HTTP/2 connection, of either side.
type conn struct {
	raw    net.Conn
	bc     *batchConn
	rec    records
	log    *zap.Logger
	server *Server // nil on the client side

	ctx           context.Context // the scope of the connection; its streams' contexts come from it
	cancel        context.CancelCauseFunc
	state         tls.ConnectionState
	remote, local netip.AddrPort
	maxStreams    int           // client: streams at once, before the peer's own limit
	idleTimeout   time.Duration // client: 0 means never
	expires       time.Time     // client: when one of the certificates does, and no more streams are opened; zero: unknown
	onClose       func()        // called once, without locks, when the connection has ended
	handlers      sync.WaitGroup
	buffered      atomic.Int64      // bytes received and not yet taken, all streams
	mem           *memlimit.Account // the memory they lie in
	withheld      atomic.Bool       // the connection's window is shut because too much is buffered

	in reader // the reader goroutine's own state

	mu        sync.Mutex
	err       error // why the connection ended; nil while it lives
	streams   map[uint32]*Stream
	lingering map[*Stream]struct{} // over, but somebody has yet to read what they received; some have by now
	nextID    uint32               // client: of the next stream
	maxPeerID uint32               // server: the highest stream the peer opened
	running   int                  // server: handlers that have not returned
	draining  atomic.Bool          // no new streams; ends with the last stream. Read without mu only by Stream.Draining
	lastID    uint32               // server: streams above it are ignored, once the second GOAWAY went out
	goneAway  bool                 // server: that GOAWAY went out
	idleSince time.Time

	peerMaxStreams uint32
	peerMaxFrame   int
	peerWindow     int // initial send window of a stream

	ticker     *time.Timer
	pingSentAt time.Time // zero: no PING is unanswered
	drainPing  bool      // the next PING answer completes a graceful GOAWAY
	budget     budget    // what the peer may waste until the next tick

	recvWindow int // what the peer may still send on the connection
	recvSize   int // what it was when it was last reopened
	w          writer
}

// budget bounds frames that cost us work or memory and bring nothing, per tick of pingInterval. It is refilled by the
// connection's timer, so that no frame needs a look at the clock.
type budget struct {
	control int // PING, SETTINGS, PRIORITY, unknown and empty frames, frames on closed streams
	resets  int // streams reset before they were answered (CVE-2023-44487)
}

var fullBudget = budget{control: 10_000, resets: 1_000}

// A stream that is opened pays for the frames that honest peers send when it ends at both sides at once, and one that is
// answered for one that will not be: however fast short connections come and go, they do not look like a flood.
const controlPerStream = 4

var errCalm = &connError{http2.ErrCodeEnhanceYourCalm, "too many useless frames"}

// spendLocked takes one from a budget; an error ends the connection.
func (c *conn) spendLocked(n *int) error {
	if *n--; *n < 0 {
		return errCalm
	}
	return nil
}

func (c *conn) spend() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.spendLocked(&c.budget.control)
}

// handshaken is a connection whose TLS handshake is over.
type handshaken struct {
	bc    *batchConn
	rec   records
	state tls.ConnectionState
}

func newConn(ctx context.Context, h handshaken, log *zap.Logger) *conn {
	c := &conn{
		raw: h.bc.Conn, bc: h.bc, rec: h.rec, log: log,
		state:          h.state,
		remote:         addrPort(h.bc.RemoteAddr()),
		local:          addrPort(h.bc.LocalAddr()),
		streams:        make(map[uint32]*Stream),
		nextID:         1,
		lastID:         maxStreamID,
		peerMaxStreams: 100, // until its SETTINGS say otherwise
		peerMaxFrame:   defaultMaxFrame,
		peerWindow:     defaultWindow,
		idleSince:      time.Now(),
		budget:         fullBudget,
	}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.w.window = defaultWindow
	c.mem = h.bc.mem.Open(c)
	h.bc.startCollecting()
	return c
}

func addrPort(a net.Addr) netip.AddrPort {
	ta, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := ta.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// start sends the preface (RFC 9113, 3.4) and starts the timer. The caller then runs readLoop.
func (c *conn) start() {
	c.mu.Lock()
	b := c.w.staged
	common := []http2.Setting{
		{ID: http2.SettingInitialWindowSize, Val: recvStreamWindow},
		{ID: http2.SettingMaxFrameSize, Val: recvMaxFrame},
	}
	if c.server != nil {
		c.in.headers = newHeaderDecoder(serverHeaderList)
		b = appendSettings(b, append(common,
			http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(c.server.maxStreams())},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: serverHeaderList})...)
	} else {
		c.in.headers = newHeaderDecoder(clientHeaderList)
		b = append(b, http2.ClientPreface...)
		b = appendSettings(b, append(common,
			http2.Setting{ID: http2.SettingEnablePush, Val: 0},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: clientHeaderList})...)
	}
	c.recvSize = c.firstWindow()
	c.recvWindow = c.recvSize
	if more := c.recvSize - defaultWindow; more > 0 {
		b = appendWindowUpdate(b, 0, more)
	}
	c.w.staged = b
	c.ticker = time.AfterFunc(pingInterval, c.tick)
	c.kickLocked()
	c.mu.Unlock()
}

// tick runs every pingInterval: it refills the budgets, checks the peer's answer to the last PING, sends the next one,
// and ends a connection that has been idle for too long.
func (c *conn) tick() {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.budget = fullBudget
	now := time.Now()
	if !c.pingSentAt.IsZero() && now.Sub(c.pingSentAt) >= pingTimeout {
		c.mu.Unlock()
		c.fail(ErrPingTimeout)
		return
	}
	if c.idleTimeout > 0 && len(c.streams) == 0 && now.Sub(c.idleSince) >= c.idleTimeout {
		c.draining.Store(true)
	}
	if c.draining.Load() && len(c.streams) == 0 && c.server == nil {
		c.mu.Unlock()
		c.shut(http2.ErrCodeNo, ErrClosed)
		return
	}
	if !c.w.busy && len(c.w.staged) == 0 {
		c.w.staged, c.w.spare = nil, nil // an idle connection holds no buffers
	}
	if c.pingSentAt.IsZero() {
		c.pingSentAt = now
		c.w.staged = appendPing(c.w.staged, 0, [8]byte{})
	}
	c.reopenLocked() // others may have let go of memory
	c.forgetReadLocked()
	c.ticker.Reset(pingInterval)
	c.kickLocked()
	c.mu.Unlock()
}

// fail ends the connection at once; the first cause stays. Every stream learns of it.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	if c.w.failAfter != nil {
		err = c.w.failAfter // what the peer does about our goodbye is no cause
	}
	c.err = err
	streams := c.streams
	c.streams = map[uint32]*Stream{}
	if c.ticker != nil {
		c.ticker.Stop()
	}
	for _, s := range streams {
		s.dropOutLocked(err)
	}
	if !c.w.busy {
		c.stopWritingLocked()
	}
	c.mu.Unlock()
	c.mem.Close()
	c.raw.Close()
	c.cancel(err)
	for _, s := range streams {
		s.endReceive(err)
	}
	if c.onClose != nil {
		c.onClose()
	}
}

// shut sends GOAWAY and close_notify and ends the connection.
func (c *conn) shut(code http2.ErrCode, cause error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.w.staged = appendGoAway(c.w.staged, c.maxPeerID, code)
	c.leaveLocked(record.CloseNotify, cause)
}

// leaveLocked sends what is staged and an alert, and ends the connection. It is called with c.mu held and the connection
// alive, and releases c.mu. It returns when all is done; a peer that does not take the alert gets little time to.
func (c *conn) leaveLocked(last record.Alert, cause error) {
	c.draining.Store(true)
	if c.w.failAfter == nil { // else somebody is leaving already, and the first cause stays
		c.w.failAfter, c.w.lastWord = cause, last
		c.raw.SetWriteDeadline(time.Now().Add(closeTimeout))
	}
	if c.w.busy {
		// Whoever writes now takes it along and then ends the connection.
		c.mu.Unlock()
		timeout := time.NewTimer(closeTimeout)
		defer timeout.Stop()
		select {
		case <-c.ctx.Done():
		case <-timeout.C:
		}
		c.fail(cause)
		return
	}
	c.w.busy = true
	c.mu.Unlock()
	c.drive(nil, true)
	c.fail(cause)
}

// leave is shut without GOAWAY, for a peer that HTTP/2 does not reach any more.
func (c *conn) leave(last record.Alert, cause error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.leaveLocked(last, cause)
}

// drain makes the connection end gracefully: the peer is told to open no more streams, one round trip later the last
// stream is named (RFC 9113, 6.8), and the connection ends with its last stream.
func (c *conn) drain() {
	c.mu.Lock()
	if c.err != nil || c.draining.Load() {
		c.mu.Unlock()
		return
	}
	c.draining.Store(true)
	if c.server != nil {
		c.drainPing = true
		c.w.staged = appendGoAway(c.w.staged, maxStreamID, http2.ErrCodeNo)
		c.w.staged = appendPing(c.w.staged, 0, drainPingData)
		c.kickLocked()
		c.mu.Unlock()
		return
	}
	idle := len(c.streams) == 0
	c.mu.Unlock()
	if idle {
		c.shut(http2.ErrCodeNo, ErrClosed)
	}
}

var drainPingData = [8]byte{'d', 'r', 'a', 'i', 'n'}

// nameLastLocked is the second half of drain.
func (c *conn) nameLastLocked() {
	c.drainPing = false
	c.goneAway = true
	c.lastID = c.maxPeerID
	c.w.staged = appendGoAway(c.w.staged, c.lastID, http2.ErrCodeNo)
}

// forgetLocked removes a stream both of whose halves are over.
func (c *conn) forgetLocked(s *Stream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	c.lingerLocked(s)
	if len(c.streams) > 0 {
		return
	}
	c.idleSince = time.Now()
	if c.draining.Load() && (c.server == nil || c.goneAway) && c.err == nil {
		// Not under the lock, and not on the caller's time.
		c.handlers.Go(func() { c.shut(http2.ErrCodeNo, ErrClosed) })
	}
}

// usableLocked reports whether a client connection can take one more stream. Certificates that have expired before the first
// are the peer's to judge: another dial would not mend them.
func (c *conn) usableLocked() bool {
	return c.err == nil && !c.draining.Load() && c.nextID <= maxStreamID &&
		len(c.streams) < c.maxStreams && len(c.streams) < int(c.peerMaxStreams) &&
		(c.expires.IsZero() || c.nextID == 1 || time.Now().Before(c.expires))
}

// open starts a stream and stages its CONNECT request, which flushStaged sends; nil when the connection cannot take it.
func (c *conn) open(authority string, h *Header) *Stream {
	c.mu.Lock()
	if !c.usableLocked() {
		c.mu.Unlock()
		return nil
	}
	s := newStream(c, c.nextID)
	c.budget.control += controlPerStream
	c.nextID += 2
	c.streams[s.id] = s
	b := c.w.staged
	at := len(b)
	b = appendFrameHeader(b, 0, http2.FrameHeaders, http2.FlagHeadersEndHeaders, s.id)
	b = appendConnect(b, authority, h)
	c.w.staged = c.splitHeaders(b, at)
	c.mu.Unlock()
	return s
}

func (c *conn) flushStaged() {
	c.mu.Lock()
	c.send(false)
}

// splitHeaders completes the HEADERS frame whose header starts at b[at], moving what exceeds the peer's frame size to
// CONTINUATION frames.
func (c *conn) splitHeaders(b []byte, at int) []byte {
	n := len(b) - at - frameHeaderBytes
	if n <= c.peerMaxFrame {
		b[at], b[at+1], b[at+2] = byte(n>>16), byte(n>>8), byte(n)
		return b
	}
	first := parseFrameHeader(b[at:])
	block := append([]byte(nil), b[at+frameHeaderBytes:]...)
	b = b[:at]
	typ, flags := http2.FrameHeaders, first.flags&^http2.FlagHeadersEndHeaders
	for len(block) > 0 {
		k := min(len(block), c.peerMaxFrame)
		if k == len(block) {
			flags |= http2.FlagHeadersEndHeaders
		}
		b = appendFrameHeader(b, k, typ, flags, first.stream)
		b = append(b, block[:k]...)
		block = block[k:]
		typ, flags = http2.FrameContinuation, 0
	}
	return b
}

// quiet reports whether the connection has no streams.
func (c *conn) quiet() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams) == 0
}

// serve reads until the connection ends and returns why; nil when it ended as agreed.
func (c *conn) serve() error {
	err := c.readLoop()
	var ce *connError
	if errors.As(err, &ce) {
		c.shut(ce.code, err)
	}
	if err == ErrTruncated && c.quiet() {
		err = ErrPeerClosed // nothing was cut
	}
	if alert, ok := alertFor(err); ok {
		c.leave(alert, err)
	}
	c.fail(err)
	c.mu.Lock()
	err = c.err
	c.mu.Unlock()
	if errors.Is(err, ErrClosed) || errors.Is(err, ErrPeerClosed) {
		return nil
	}
	return err
}
