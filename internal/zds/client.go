package zds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"

	zdsapi "github.com/mistnet/mistnet/api/zds"
)

const (
	firstBackoff = 10 * time.Millisecond
	lastBackoff  = time.Second // it is a socket of this machine, and pods that start wait for it
	// handleTimeout is less than what the agent waits for the answer, so that it hears why.
	handleTimeout = 4 * time.Second
)

// Client is ztunnel's side. Path and Pods are required.
type Client struct {
	// Path is the agent's socket.
	Path string
	// Pods carries the requests out.
	Pods Pods
	// Log is optional.
	Log *zap.Logger
	// OnConnected, if set, is told when the agent was greeted (true) and when it was lost (false). Pods stay as they are
	// while it is away. What it sent is complete only once Pods.Synced was called.
	OnConnected func(bool)
}

// Run keeps a connection to the agent until ctx ends: it dials again after 10 ms, doubling to 1 s, and starts over after
// the agent answered with at least one request. It returns nil when ctx ended, an error only when fields are missing.
func (c *Client) Run(ctx context.Context) error {
	if c.Path == "" || c.Pods == nil {
		return errors.New("run ZDS client: Path and Pods are required")
	}
	log := c.Log
	if log == nil {
		log = zap.NewNop()
	}
	backoff := firstBackoff
	for {
		heard, err := c.session(ctx, log)
		if ctx.Err() != nil {
			return nil
		}
		if heard {
			backoff = firstBackoff
		}
		log.Warn("no connection to the CNI agent", zap.String("path", c.Path), zap.Duration("retry", backoff), zap.Error(err))
		timer := time.NewTimer(backoff)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		backoff = min(2*backoff, lastBackoff)
	}
}

// session is one connection; heard tells whether the agent said anything that made sense.
func (c *Client) session(ctx context.Context, log *zap.Logger) (heard bool, err error) {
	dialer := net.Dialer{Timeout: defaultTimeout}
	raw, err := dialer.DialContext(ctx, "unixpacket", c.Path)
	if err != nil {
		return false, err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	conn := packetConn{raw.(*net.UnixConn)}
	if err := conn.send(&zdsapi.ZdsHello{Version: zdsapi.Version_V1}, nil, defaultTimeout); err != nil {
		return false, fmt.Errorf("send hello: %w", err)
	}
	log.Info("connected to the CNI agent", zap.String("path", c.Path))
	if c.OnConnected != nil {
		c.OnConnected(true)
		defer c.OnConnected(false)
	}
	s := session{pods: c.Pods, log: log}
	buf := make([]byte, maxPacketBytes)
	for {
		err := s.next(ctx, conn, buf)
		if err != nil {
			return s.heard, err
		}
	}
}

// session is what a client remembers of one connection.
type session struct {
	pods   Pods
	log    *zap.Logger
	heard  bool
	synced bool
	uids   []string // mentioned before SnapshotSent
}

// next takes one request, carries it out and answers it. An error ends the connection.
func (s *session) next(ctx context.Context, conn packetConn, buf []byte) error {
	packet, files, err := conn.receive(buf)
	if errors.Is(err, io.EOF) {
		return errors.New("closed by the agent")
	}
	if err != nil {
		return fmt.Errorf("receive request: %w", err)
	}
	st, err := decodeRequest(packet, len(files))
	if err != nil {
		closeAll(files)
		return err
	}
	if s.synced && (st.kind == stepKeep || st.kind == stepSnapshotSent) {
		closeAll(files)
		return fmt.Errorf("%w: %v after the snapshot was complete", errProtocol, st.kind)
	}
	s.heard = true
	hctx, cancel := context.WithTimeout(ctx, handleTimeout)
	defer cancel()
	var herr error
	switch st.kind {
	case stepAdd:
		s.mention(st.info.UID)
		herr = s.pods.Add(hctx, st.info, files[0])
	case stepKeep:
		s.mention(st.info.UID)
		herr = s.pods.Keep(hctx, st.info.UID)
	case stepDel:
		s.forget(st.info.UID)
		herr = s.pods.Del(hctx, st.info.UID)
	case stepSnapshotSent:
		s.synced = true
		herr = s.pods.Synced(hctx, s.uids)
		s.uids = nil
	case stepUnknown:
		return fmt.Errorf("%w: request of an unknown kind", errProtocol)
	}
	if herr != nil {
		s.log.Warn("request of the CNI agent failed", zap.Stringer("request", st.kind), zap.String("uid", st.info.UID),
			zap.String("namespace", st.info.Namespace), zap.String("name", st.info.Name), zap.Error(herr))
	}
	if err := conn.send(ackResponse(herr), nil, defaultTimeout); err != nil {
		return fmt.Errorf("send response: %w", err)
	}
	return nil
}

// mention remembers a pod of the snapshot. One whose Add failed is mentioned too: the agent tries again, and what already
// runs of it must not be torn down meanwhile.
func (s *session) mention(uid string) {
	if !s.synced && !slices.Contains(s.uids, uid) {
		s.uids = append(s.uids, uid)
	}
}

func (s *session) forget(uid string) {
	s.uids = slices.DeleteFunc(s.uids, func(u string) bool { return u == uid })
}
