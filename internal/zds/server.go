package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"

	zdsapi "github.com/mistnet/mistnet/api/zds"
)

// ErrNotConnected is what Server.Add returns while no ztunnel is connected.
var ErrNotConnected = errors.New("no ztunnel is connected")

const (
	acceptBurst    = 5 // connections taken at once; after that one each acceptInterval
	acceptInterval = 200 * time.Millisecond
	maxPeers       = 16 // connections at a time, of which an upgrade needs two
)

// Server is the agent's side. Path and Snapshot are required. Change your own list of pods before you call Add or Del:
// then a ztunnel that connects meanwhile misses nothing.
type Server struct {
	// Path is the socket to listen on. Its directory is made when it is missing.
	Path string
	// Snapshot returns every enrolled pod. Add and Del wait while it runs, so they must not be called with a lock held
	// that it takes. The files stay the agent's. One that is closed before it could be sent is
	// taken for a pod that just left.
	Snapshot func() []Pod
	// Log is optional.
	Log *zap.Logger
	// Timeout bounds one step: writing a packet, or waiting for its answer. Zero: 5 s.
	Timeout time.Duration

	mu    sync.Mutex
	peers []*peer // that said hello, the newest last
}

// Run listens until ctx ends. It fails at once when another live agent has the socket or the path is something else than
// a socket; the socket file of an agent that died is replaced.
func (s *Server) Run(ctx context.Context) error {
	if s.Path == "" || s.Snapshot == nil {
		return errors.New("run ZDS server: Path and Snapshot are required")
	}
	l, err := s.listen(ctx)
	if err != nil {
		return fmt.Errorf("listen for ztunnel: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	slots := make(chan struct{}, maxPeers) // a buffer of one per connection allowed
	credit, last := acceptBurst, time.Now()
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil { // out of descriptors or memory, or the peer is gone already: nothing to die of
			s.log().Warn("ztunnel not accepted", zap.Error(err))
			select {
			case <-ctx.Done():
			case <-time.After(acceptInterval):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
			wg.Go(func() {
				defer func() { <-slots }()
				s.serve(ctx, c)
			})
		default:
			s.log().Warn("too many connections of ztunnels", zap.Int("limit", maxPeers))
			c.Close()
		}
		credit = min(acceptBurst, credit+int(time.Since(last)/acceptInterval)) - 1
		last = time.Now()
		if credit > 0 {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(acceptInterval):
		}
	}
}

func (s *Server) log() *zap.Logger {
	if s.Log == nil {
		return zap.NewNop()
	}
	return s.Log
}

func (s *Server) timeout() time.Duration {
	if s.Timeout > 0 {
		return s.Timeout
	}
	return defaultTimeout
}

// listen makes the socket, over the one of an agent that died.
func (s *Server) listen(ctx context.Context) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(s.Path), 0o755); err != nil {
		return nil, err
	}
	info, err := os.Lstat(s.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s is there and not a socket: move it away", s.Path)
	default:
		dialer := net.Dialer{Timeout: s.timeout()}
		if c, err := dialer.DialContext(ctx, "unixpacket", s.Path); err == nil {
			c.Close()
			return nil, fmt.Errorf("%s belongs to another agent that is alive: is one running on this node already?", s.Path)
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("find out whether %s is in use: %w", s.Path, err)
		}
		if err := os.Remove(s.Path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.Path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(s.Path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// peer is one ztunnel. turn is held by whoever has a request under way; waiters are served first come, first served.
type peer struct {
	conn    packetConn
	turn    chan struct{} // one token
	answers chan []byte   // one place: there is one request at a time
	gone    chan struct{} // closed when the connection ended
	timeout time.Duration
}

// serve is the life of one connection. It reads all the time, so that a ztunnel that goes away is missed at once.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	p := &peer{
		conn: packetConn{c}, turn: make(chan struct{}, 1), answers: make(chan []byte, 1), gone: make(chan struct{}),
		timeout: s.timeout(),
	}
	log := s.log()
	if err := p.hello(); err != nil {
		log.Info("connection without a hello", zap.Error(err))
		return
	}
	p.turn <- struct{}{} // taken before anybody knows the peer: the snapshot goes first
	s.mu.Lock()
	s.peers = append(s.peers, p)
	n := len(s.peers)
	s.mu.Unlock()
	log.Info("ztunnel connected", zap.Int("connected", n))

	var wg sync.WaitGroup
	wg.Go(func() {
		defer p.release()
		if err := p.snapshot(s.Snapshot(), log); err != nil {
			log.Warn("snapshot not sent", zap.Error(err))
			c.Close()
		}
	})
	err := p.read()
	c.Close()
	close(p.gone)
	s.mu.Lock()
	s.peers = slices.DeleteFunc(s.peers, func(o *peer) bool { return o == p })
	n = len(s.peers)
	s.mu.Unlock()
	wg.Wait()
	log.Info("ztunnel disconnected", zap.Int("connected", n), zap.Error(err))
}

// hello waits for the first packet.
func (p *peer) hello() error {
	if err := p.conn.SetReadDeadline(time.Now().Add(p.timeout)); err != nil {
		return err
	}
	packet, files, err := p.conn.receive(make([]byte, maxPacketBytes))
	if err != nil {
		return err
	}
	if len(files) > 0 {
		closeAll(files)
		return fmt.Errorf("%w: hello with descriptors", errProtocol)
	}
	if err := decodeHello(packet); err != nil {
		return err
	}
	return p.conn.SetReadDeadline(time.Time{})
}

// read passes answers on until the connection ends.
func (p *peer) read() error {
	for {
		packet, files, err := p.conn.receive(make([]byte, maxPacketBytes))
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(files) > 0 {
			closeAll(files)
			return fmt.Errorf("%w: response with descriptors", errProtocol)
		}
		select {
		case p.answers <- packet:
		default:
			return fmt.Errorf("%w: response that nobody asked for", errProtocol)
		}
	}
}

func (p *peer) release() { <-p.turn }

// snapshot sends every pod. A pod that ztunnel cannot take is the agent's to retry: the others go on.
func (p *peer) snapshot(pods []Pod, log *zap.Logger) error {
	for _, pod := range pods {
		m := addRequest(pod.Info)
		if pod.NetNS == nil {
			m = keepRequest(pod.Info.UID)
		}
		var refused *RefusedError
		var notSent *notSentError
		err := p.ask(m, pod.NetNS)
		switch {
		case errors.As(err, &notSent) && errors.Is(err, os.ErrClosed): // it left while the list was sent
		case errors.As(err, &refused), errors.As(err, &notSent):
			log.Warn("pod of the snapshot not taken", zap.String("uid", pod.Info.UID),
				zap.String("namespace", pod.Info.Namespace), zap.String("name", pod.Info.Name), zap.Error(err))
		case err != nil:
			return err
		}
	}
	err := p.ask(snapshotSentRequest(), nil)
	var refused *RefusedError
	if errors.As(err, &refused) {
		log.Warn("end of the snapshot not taken", zap.Error(err))
		return nil
	}
	return err
}

// RefusedError is ztunnel's own complaint about a request; Reason is its text. The connection goes on.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "refused by ztunnel: " + e.Reason }

// ask sends one request and waits for its answer; the caller has the turn. When it fails in another way than by ztunnel's
// refusal the two sides may be out of step, and the connection is closed.
func (p *peer) ask(m *zdsapi.WorkloadRequest, file *os.File) error {
	if len(p.answers) > 0 {
		p.conn.Close()
		return fmt.Errorf("%w: response before its request", errProtocol)
	}
	if err := p.conn.send(m, file, p.timeout); err != nil {
		var notSent *notSentError
		if !errors.As(err, &notSent) {
			p.conn.Close()
		}
		return fmt.Errorf("send to ztunnel: %w", err)
	}
	timer := time.NewTimer(p.timeout)
	defer timer.Stop()
	var packet []byte
	select {
	case packet = <-p.answers:
	case <-p.gone:
		if len(p.answers) == 0 {
			return errors.New("ztunnel disconnected before it answered")
		}
		packet = <-p.answers // it answered, then left
	case <-timer.C:
		p.conn.Close()
		return fmt.Errorf("ztunnel did not answer in %v", p.timeout)
	}
	reason, err := decodeResponse(packet)
	if err != nil {
		p.conn.Close()
		return err
	}
	if reason != "" {
		return &RefusedError{reason}
	}
	return nil
}

// take waits for the turn.
func (p *peer) take(ctx context.Context) error {
	select {
	case p.turn <- struct{}{}:
		return nil
	case <-p.gone:
		return errors.New("ztunnel disconnected")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Add sends a pod to the ztunnel that connected last, which during an upgrade is the one to stay, and waits for its
// answer: at most until ctx ends for its turn, then for the timeout of a step. The pod's file stays the caller's. Errors:
// ErrNotConnected, *RefusedError, or what befell the connection; in each case the agent tries again, or the pod goes out
// with the next snapshot.
func (s *Server) Add(ctx context.Context, pod Pod) error {
	if pod.NetNS == nil {
		return fmt.Errorf("add pod %s: no network namespace", pod.Info.UID)
	}
	s.mu.Lock()
	var p *peer
	if n := len(s.peers); n > 0 {
		p = s.peers[n-1]
	}
	s.mu.Unlock()
	if p == nil {
		return fmt.Errorf("add pod %s: %w", pod.Info.UID, ErrNotConnected)
	}
	if err := p.take(ctx); err != nil {
		return fmt.Errorf("add pod %s: %w", pod.Info.UID, err)
	}
	defer p.release()
	if err := p.ask(addRequest(pod.Info), pod.NetNS); err != nil {
		return fmt.Errorf("add pod %s: %w", pod.Info.UID, err)
	}
	return nil
}

// Del tells every connected ztunnel that a pod is gone, and returns what went wrong at any of them. With none connected
// there is nothing to do: the next snapshot does not hold the pod.
func (s *Server) Del(ctx context.Context, uid string) error {
	s.mu.Lock()
	peers := slices.Clone(s.peers)
	s.mu.Unlock()
	errs := make([]error, len(peers))
	var wg sync.WaitGroup
	for i, p := range peers {
		wg.Go(func() {
			if errs[i] = p.take(ctx); errs[i] != nil {
				return
			}
			defer p.release()
			errs[i] = p.ask(delRequest(uid), nil)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete pod %s: %w", uid, err)
	}
	return nil
}

// Connected returns how many ztunnels are connected and said hello.
func (s *Server) Connected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.peers)
}
