package http2

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/memlimit"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// Config bounds what a peer may do. Zero fields take the value in parentheses.
type Config struct {
	MaxStreams    int              // at once: of a client (1024), or to an upstream, which may allow less (100)
	IdleTimeout   time.Duration    // of a server's connection without streams (1 h)
	HeadTimeout   time.Duration    // of the connection's first frames, and of a header block in several frames (10 s)
	BodyTimeout   time.Duration    // in which a request body of declared length must bring something (2 min)
	StallTimeout  time.Duration    // in which a peer must open the window of a stream (5 min)
	WriteTimeout  time.Duration    // in which a peer must take a byte of what is written (30 s)
	PingInterval  time.Duration    // of an upstream's connection that is silent while streams are open (0: never)
	PingTimeout   time.Duration    // in which the ping must be answered (20 s)
	CloseTimeout  time.Duration    // for the last word of a connection (1 s)
	MaxRequests   int              // to an upstream over the connection's life (0: no end)
	Memory        *memlimit.Budget // what connections hold is charged to (nil: nothing is)
	workersToKeep int
}

func (c Config) filled() Config {
	for _, d := range [...]struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.IdleTimeout, time.Hour},
		{&c.HeadTimeout, 10 * time.Second},
		{&c.BodyTimeout, 2 * time.Minute},
		{&c.StallTimeout, 5 * time.Minute},
		{&c.WriteTimeout, 30 * time.Second},
		{&c.PingTimeout, 20 * time.Second},
		{&c.CloseTimeout, time.Second},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	c.workersToKeep = 32
	return c
}

var (
	errClosed      = errors.New("http2: closed")
	errPeerClosed  = errors.New("http2: connection closed by peer")
	errPingTimeout = errors.New("http2: peer did not answer a ping in time")
	errIdle        = errors.New("http2: nothing was asked for long")
)

// ErrUnseen is what a request ended of that the peer did not look at: it was not sent yet when its connection ended or drained, or the
// peer's GOAWAY left it out (RFC 9113, 6.8). It may be sent again, whatever it asks for.
var ErrUnseen = errors.New("http2: the peer did not look at the stream")

// tickInterval is how often budgets are refilled.
const tickInterval = 10 * time.Second

// budget bounds frames that cost us work or memory and bring nothing, per tickInterval. It is refilled by the connection's
// timer, so that no frame needs a look at the clock.
type budget struct {
	control int // PING, SETTINGS, PRIORITY, unknown and empty frames, tiny window updates, frames on closed streams
	resets  int // streams reset before they were answered (CVE-2023-44487), or refused
}

var fullBudget = budget{control: 10_000, resets: 1_000}

// What honest peers send besides: a stream pays for the frames around it, a frame with payload for the pings that measure
// the way it went. However busy a connection is, that does not look like a flood.
const (
	controlPerStream = 4
	controlPerData   = 2
)

var errCalm = &connError{http2.ErrCodeEnhanceYourCalm, "too many useless frames"}

// conn is one HTTP/2 connection, of either side.
type conn struct {
	raw    net.Conn
	cfg    Config
	server *ServerConn // one of the two
	client *ClientConn

	// Of the reader goroutine.
	dec           *decoder
	sink          headSink
	preface       string // server: what is still to come of the client's
	settled       bool   // the peer's first SETTINGS arrived
	block         []byte // header block so far, while CONTINUATION frames are due
	blockHeader   frameHeader
	continuations int // 0: no block is open
	trailers      http1.Fields
	memos         memos
	claims        []claim // as goOn works on them
	owed          []*conn // that something was staged on and not written yet

	done chan struct{}  // closed when the connection has ended
	work sync.WaitGroup // started while the connection lived, under mu

	mu        sync.Mutex
	err       error // why the connection ended; nil while it lives
	streams   map[uint32]*stream
	nextID    uint32     // client: of the next stream
	maxPeerID uint32     // server: the highest stream the peer opened
	ended     [64]uint32 // the last streams that the peer ended, by id
	lastEnded int
	lastID    uint32 // streams above it are not served: server, once the second GOAWAY went out; client, by the peer's
	draining  bool   // no new streams; ends with the last stream
	goneAway  bool   // server: the second GOAWAY went out
	drainPing bool   // server: the next answer to our ping completes the first
	wound     bool   // server: drain after the first stream began
	spent     bool   // client: no new streams, by our own choice
	budget    budget
	ticker    *time.Timer
	idleSince time.Time
	heard     bool // something came since the last tick
	pingSent  time.Time

	peerConnect    bool // the peer takes extended CONNECT (RFC 8441, 3)
	peerMaxStreams uint32
	peerMaxFrame   int
	peerWindow     int // initial send window of a stream

	stirred []*stream   // client: whose exchange waits without a goroutine, and for which something came
	alarm   *time.Timer // client: for the deadlines of such exchanges
	alarmAt time.Time   // zero: it is not set

	mem        *memlimit.Account // what is received and not yet taken
	recvWindow int               // what the peer may still send on the connection
	recvSize   int               // what it was when it was last reopened
	buffered   int               // bytes received and not yet taken, all streams
	fed        *stream           // the streams that have received something and are in use, by their next; nil: none, or memory is not counted
	w          writer
}

func (c *conn) init(raw net.Conn, cfg Config) {
	c.raw, c.cfg, c.w.socket = raw, cfg.filled(), socketOf(raw)
	c.w.driver = func() {
		defer c.work.Done()
		c.mu.Lock()
		c.drive(-1)
	}
	c.dec = newDecoder()
	c.done = make(chan struct{})
	c.streams = make(map[uint32]*stream)
	c.nextID, c.lastID = 1, maxStreamID
	c.budget = fullBudget
	c.peerMaxStreams, c.peerMaxFrame, c.peerWindow = 100, 16384, defaultWindow
	c.w.window = defaultWindow
	c.cfg.Memory.Charge(connBytes)
	c.mem = c.cfg.Memory.Open(holder{c})
	c.recvSize = c.firstWindow()
	c.recvWindow = c.recvSize
	c.idleSince = time.Now()
}

// greet stages our first frames (RFC 9113, 3.4), before anybody can stage others.
func (c *conn) greet(settings ...http2.Setting) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil {
		c.w.staged = append(c.room(len(http2.ClientPreface)), http2.ClientPreface...)
	}
	c.w.staged = appendSettings(c.room(64), append(settings,
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: recvStreamWindow},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: maxHeadList})...)
	if more := c.recvSize - defaultWindow; more > 0 {
		c.w.staged = appendWindowUpdate(c.room(13), 0, more)
	}
}

// start sends what is staged and starts the timer.
func (c *conn) start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.ticker = time.AfterFunc(c.tickEvery(), c.tick)
	c.kickLocked()
}

func (c *conn) tickEvery() time.Duration {
	if c.cfg.PingInterval > 0 && c.cfg.PingInterval < tickInterval {
		return c.cfg.PingInterval
	}
	return tickInterval
}

// tick refills the budgets, asks a silent upstream whether it is there, and ends a connection that has been idle for too
// long.
func (c *conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.budget = fullBudget
	now := time.Now()
	heard := c.heard
	c.heard = false
	if !heard && len(c.streams) == 0 {
		c.restLocked()
	}
	switch {
	case !c.pingSent.IsZero() && now.Sub(c.pingSent) >= c.cfg.PingTimeout:
		c.work.Go(func() { c.fail(errPingTimeout) }) // not under the lock
		return
	case c.server != nil && len(c.streams) == 0 && now.Sub(c.idleSince) >= c.cfg.IdleTimeout:
		c.work.Go(func() { c.shut(http2.ErrCodeNo, errIdle) })
		return
	case c.server == nil && c.cfg.PingInterval > 0 && !heard && len(c.streams) > 0 && c.pingSent.IsZero():
		c.pingSent = now
		c.w.staged = appendPing(c.room(17), 0, [8]byte{})
		c.kickLocked()
	}
	c.reopenLocked() // others may have let go of memory
	c.kickLocked()
	c.ticker.Reset(c.tickEvery())
}

// restLocked lets go of what is kept for the next streams, when there have been none for a while: workers with their grown stacks,
// streams with their heads.
func (c *conn) restLocked() {
	if c.client != nil {
		c.client.free = nil
		return
	}
	for _, ch := range c.server.idle {
		close(ch)
	}
	c.server.idle, c.server.free = nil, nil
}

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
	streams := make([]*stream, 0, len(c.streams))
	for _, s := range c.streams {
		s.endLocked(err)
		streams = append(streams, s)
	}
	clear(c.streams)
	c.releaseLocked()
	c.cfg.Memory.Release(connBytes)
	c.mem.Close()
	var waiting []claim
	for _, s := range streams {
		if x := s.claimLocked(); x != nil {
			waiting = append(waiting, claim{x, false})
		}
	}
	for _, t := range [...]*time.Timer{c.ticker, c.alarm} {
		if t != nil {
			t.Stop()
		}
	}
	c.mu.Unlock()
	_ = c.raw.Close()
	close(c.done)
	for _, s := range streams {
		s.tellGone()
	}
	for _, x := range waiting {
		x.handOver()
	}
}

// shut sends GOAWAY and ends the connection. A client that did nothing wrong may be writing just now, and would take the failure
// of that for the end of what it has not read yet: it is told by the end of our half, and has CloseTimeout to end its own.
func (c *conn) shut(code http2.ErrCode, cause error) {
	c.mu.Lock()
	if c.err != nil || c.w.failAfter != nil {
		c.mu.Unlock()
		return
	}
	if !c.goneAway || code != http2.ErrCodeNo { // else it was told
		c.w.staged = appendGoAway(c.room(17), c.maxPeerID, code)
	}
	if c.server != nil && code == http2.ErrCodeNo {
		c.goneAway, c.lastID, c.w.half = true, min(c.lastID, c.maxPeerID), halfOf(c.raw)
	}
	c.draining, c.w.failAfter = true, cause
	_ = c.raw.SetWriteDeadline(time.Now().Add(c.cfg.CloseTimeout))
	if c.w.busy { // who writes takes it along
		c.mu.Unlock()
	} else {
		c.w.busy = true
		c.drive(maxRounds)
	}
	t := time.NewTimer(c.cfg.CloseTimeout)
	defer t.Stop()
	select {
	case <-c.done:
	case <-t.C:
		c.fail(cause)
	}
}

// half is a connection whose two directions end one by one.
type half interface{ CloseWrite() error }

// halfOf returns nil for a connection that ends only as a whole.
func halfOf(conn net.Conn) half {
	h, _ := writesTo(conn).(half)
	return h
}

// forgetLocked removes a stream both of whose halves are over.
func (c *conn) forgetLocked(s *stream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	if len(c.streams) > 0 {
		return
	}
	c.idleSince = time.Now()
	c.heard = true
	if c.draining && (c.server == nil || c.goneAway) && c.err == nil {
		c.work.Go(func() { c.shut(http2.ErrCodeNo, errClosed) }) // not under the lock, and not on the caller's time
	}
}

// endedLocked remembers that the peer has ended a stream, and will send nothing more on it. Which streams we have reset
// need not be remembered so: what the peer had sent before it knew is ignored.
func (c *conn) endedLocked(id uint32) {
	c.lastEnded = (c.lastEnded + 1) % len(c.ended)
	c.ended[c.lastEnded] = id
}

// overLocked judges a frame on a stream that is over.
func (c *conn) overLocked(h frameHeader) error {
	if slices.Contains(c.ended[:], h.stream) {
		return connErrorf(http2.ErrCodeStreamClosed, "%s on stream %d, which was ended", h.typ, h.stream)
	}
	return c.spendLocked(&c.budget.control)
}

// streamLocked finds the stream of a frame. It is nil, without error, for a stream that is over: its peer may not know
// yet. A stream that never was is the peer's fault (RFC 9113, 5.1).
func (c *conn) streamLocked(h frameHeader) (*stream, error) {
	if s := c.streams[h.stream]; s != nil {
		return s, nil
	}
	idle := h.stream >= c.nextID || h.stream%2 == 0
	if c.server != nil {
		idle = h.stream > c.maxPeerID || h.stream%2 == 0
	}
	if idle {
		return nil, connErrorf(http2.ErrCodeProtocol, "%s on idle stream %d", h.typ, h.stream)
	}
	return nil, nil
}

// run reads until the connection ends and returns why; nil when it ended as agreed.
func (c *conn) run() error {
	err := c.readLoop()
	if e, ok := errors.AsType[*connError](err); ok {
		c.shut(e.code, err)
	}
	if errors.Is(err, io.EOF) {
		err = errPeerClosed
	}
	c.fail(err)
	c.work.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, fine := range [...]error{errClosed, errPeerClosed, errIdle} {
		if errors.Is(c.err, fine) {
			return nil
		}
	}
	return c.err
}
