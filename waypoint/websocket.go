package waypoint

import (
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// replyNoExtended is the answer when the application can be asked for a tunnel in neither version's way.
var replyNoExtended = reply{502, "the application speaks HTTP/2 without extended CONNECT (RFC 8441), and does not switch protocols in HTTP/1.1",
	"UPE", "upgrade_failed"}

// replyKeyless answers a client of HTTP/1.1 whose question an upstream of HTTP/2 would not see.
var replyKeyless = reply{400, "Sec-WebSocket-Key is not 16 bytes in base64", "DPE", "upgrade_failed"}

// settingsTimeout is how long an application may take to say what it takes, which is the first thing it says.
const settingsTimeout = 2 * time.Second

// extended reports whether an upstream of HTTP/2 takes extended CONNECT.
func extended(ctx context.Context, up *upstream.Conn) bool {
	ctx, cancel := context.WithTimeout(ctx, settingsTimeout)
	defer cancel()
	return up.Stream.Extended(ctx)
}

// handshake is what a WebSocket's two ends prove to each other in HTTP/1.1 (RFC 6455, 4) and leave out in HTTP/2 (RFC 8441, 5.1).
// Where versions differ the waypoint does it for the one that leaves it out.
type handshake struct {
	made string // the key sent for a client of HTTP/2; "": none
	due  bool   // a client of HTTP/1.1 is to be told what follows from its key
}

// shake edits a request that asks for a WebSocket as its upstream's version wants it.
func (s *session) shake(up *upstream.Conn) {
	s.shaken = handshake{}
	if !strings.EqualFold(s.q.Upgrade, "websocket") || (s.stream != nil) == (up.Stream != nil) {
		return
	}
	if up.Stream != nil {
		s.shaken.due = true
		s.edits.Remove("sec-websocket-key")
		return
	}
	// It keeps no secret: it shows that an answer was made for this question.
	var nonce [16]byte
	binary.LittleEndian.PutUint64(nonce[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(nonce[8:], rand.Uint64())
	s.shaken.made = base64.StdEncoding.EncodeToString(nonce[:])
	s.edits.Set("sec-websocket-key", s.shaken.made)
}

// answered reports whether the response is one to the request's key.
func (h *handshake) answered(resp *http1.Response) bool {
	if !resp.Tunnel || h.made == "" {
		return true
	}
	v, _ := resp.Value("sec-websocket-accept")
	return v == acceptance(h.made)
}

// conclude edits the response to a request that shake edited.
func (s *session) conclude(resp *http1.Response) {
	switch {
	case !resp.Tunnel:
	case s.shaken.made != "":
		s.edits.Remove("sec-websocket-accept")
	case s.shaken.due:
		key, _ := s.q.Value("sec-websocket-key")
		s.edits.Set("sec-websocket-accept", acceptance(key))
	}
}

// acceptance is what follows from a key (RFC 6455, 4.2.2).
func acceptance(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// keyless reports whether a request of HTTP/1.1 for a WebSocket has not the one key it must have: 16 bytes in base64.
func (s *session) keyless() bool {
	if s.stream != nil || !strings.EqualFold(s.q.Upgrade, "websocket") {
		return false
	}
	key, _ := s.q.Value("sec-websocket-key")
	nonce, err := base64.StdEncoding.DecodeString(key)
	return err != nil || len(nonce) != 16
}

// join carries bytes both ways once client and upstream have left HTTP, for as long as policies allow what the request began.
func (s *session) join(ctx context.Context, up *upstream.Conn) {
	defer up.End()
	ctx, p := s.passages.enter(ctx, s.tunnel, &s.asked)
	defer s.passages.leave(p)
	if way := &s.flight.plan; way.target != nil {
		s.passages.lead(p, s.rule, s.to.cluster(way.backend.Service, &way.backend.Ref), s.led(way))
	}
	p.recheck(s.state.load()) // they may have changed before it was registered
	var down, far relay.Conn
	if s.stream != nil {
		down = s.stream.Tunnel()
	} else {
		down = s.conn.Raw()
	}
	if up.Stream != nil {
		defer up.Close()
		far = up.Stream.Tunnel()
	} else {
		far = up.Raw()
	}
	noteEnd(&s.log, relay.Pump(ctx, down, far, &s.log.Bytes))
}
