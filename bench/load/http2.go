package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// What both ends of ours grant: more than they ever have under way.
const (
	h2Window     = 1 << 20
	h2ConnWindow = 1 << 30
	h2FrameHead  = 9
	h2FrameBytes = 16 << 10 // the longest payload that may come
	h2Window0    = 65535    // what a peer grants before it says otherwise (RFC 9113, 6.9.2)
)

// h2Conn is what the client and the server have in common: frames in, frames out, one write for all that one read brought.
type h2Conn struct {
	conn   net.Conn
	in     []byte // read[r:w] is unparsed
	r, w   int
	out    []byte
	window int // of the connection, for what we send
	taken  int // received since the connection's window was last widened

	block  bytes.Buffer // of headers
	encode *hpack.Encoder
}

func newH2Conn(c net.Conn) *h2Conn {
	h := &h2Conn{conn: c, in: make([]byte, 64<<10), window: h2Window0}
	h.encode = hpack.NewEncoder(&h.block)
	return h
}

// headers appends a HEADERS frame.
func (c *h2Conn) headers(stream uint32, fields []hpack.HeaderField, flags http2.Flags) {
	c.block.Reset()
	for _, f := range fields {
		_ = c.encode.WriteField(f) // a buffer takes all
	}
	c.frame(c.block.Len(), http2.FrameHeaders, flags|http2.FlagHeadersEndHeaders, stream)
	c.out = append(c.out, c.block.Bytes()...)
}

// settings appends what either side begins with.
func (c *h2Conn) settings() {
	c.frame(12, http2.FrameSettings, 0, 0)
	c.setting(http2.SettingInitialWindowSize, h2Window)
	c.setting(http2.SettingMaxConcurrentStreams, 1000)
	c.widen(h2ConnWindow - h2Window0)
}

func (c *h2Conn) setting(id http2.SettingID, value uint32) {
	c.out = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(c.out, uint16(id)), value)
}

func (c *h2Conn) widen(n int) {
	c.frame(4, http2.FrameWindowUpdate, 0, 0)
	c.out = binary.BigEndian.AppendUint32(c.out, uint32(n))
}

func (c *h2Conn) frame(length int, typ http2.FrameType, flags http2.Flags, stream uint32) {
	c.out = append(c.out, byte(length>>16), byte(length>>8), byte(length), byte(typ), byte(flags))
	c.out = binary.BigEndian.AppendUint32(c.out, stream)
}

// data appends a body that ends its stream if end says so.
func (c *h2Conn) data(stream uint32, body []byte, end bool) {
	var flags http2.Flags
	if end {
		flags = http2.FlagDataEndStream
	}
	c.frame(len(body), http2.FrameData, flags, stream)
	c.out = append(c.out, body...)
	c.window -= len(body)
}

func (c *h2Conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.conn.Write(c.out)
	c.out = c.out[:0]
	return err
}

// fill reads once.
func (c *h2Conn) fill() error {
	if c.r > 0 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	n, err := c.conn.Read(c.in[c.w:])
	if c.w += n; n > 0 {
		return nil
	}
	return err
}

// next takes a whole frame out of what was read.
func (c *h2Conn) next() (h http2.FrameHeader, p []byte, ok bool, err error) {
	b := c.in[c.r:c.w]
	if len(b) < h2FrameHead {
		return h, nil, false, nil
	}
	h.Length = uint32(b[0])<<16 | uint32(b[1])<<8 | uint32(b[2])
	h.Type, h.Flags, h.StreamID = http2.FrameType(b[3]), http2.Flags(b[4]), binary.BigEndian.Uint32(b[5:])&(1<<31-1)
	if h.Length > h2FrameBytes {
		return h, nil, false, fmt.Errorf("frame of %d bytes", h.Length)
	}
	if len(b) < h2FrameHead+int(h.Length) {
		return h, nil, false, nil
	}
	c.r += h2FrameHead + int(h.Length)
	return h, b[h2FrameHead : h2FrameHead+int(h.Length)], true, nil
}

// keep handles the frames that are about the connection and reports whether h was one.
func (c *h2Conn) keep(h http2.FrameHeader, p []byte) (bool, error) {
	switch h.Type {
	case http2.FrameSettings:
		if h.Flags&http2.FlagSettingsAck == 0 {
			c.frame(0, http2.FrameSettings, http2.FlagSettingsAck, 0)
		}
		for ; len(p) >= 6; p = p[6:] {
			if http2.SettingID(binary.BigEndian.Uint16(p)) == http2.SettingHeaderTableSize {
				c.encode.SetMaxDynamicTableSizeLimit(binary.BigEndian.Uint32(p[2:]))
			}
		}
	case http2.FramePing:
		if h.Flags&http2.FlagPingAck == 0 {
			c.frame(len(p), http2.FramePing, http2.FlagPingAck, 0)
			c.out = append(c.out, p...)
		}
	case http2.FrameWindowUpdate:
		if h.StreamID == 0 && len(p) == 4 {
			c.window += int(binary.BigEndian.Uint32(p) & (1<<31 - 1))
		}
	case http2.FrameGoAway:
		if len(p) >= 8 {
			return true, fmt.Errorf("the peer goes away: %v", http2.ErrCode(binary.BigEndian.Uint32(p[4:])))
		}
		return true, errors.New("the peer goes away")
	case http2.FrameData:
		if c.taken += len(p); c.taken >= h2ConnWindow/4 {
			c.widen(c.taken)
			c.taken = 0
		}
		return false, nil
	case http2.FrameHeaders, http2.FrameContinuation, http2.FrameRSTStream:
		return false, nil
	case http2.FramePriority, http2.FramePushPromise, http2.FramePriorityUpdate:
	}
	return true, nil
}

// unpadded takes padding and priority off a HEADERS frame's payload (RFC 9113, 6.2).
func unpadded(h http2.FrameHeader, p []byte) []byte {
	if h.Flags&http2.FlagHeadersPadded != 0 && len(p) > 0 {
		p = p[1:max(1, len(p)-int(p[0]))]
	}
	if h.Flags&http2.FlagHeadersPriority != 0 && len(p) >= 5 {
		p = p[5:]
	}
	return p
}

// h2Client keeps requests under way on one HTTP/2 connection without TLS.
type h2Client struct {
	*h2Conn
	o      Order
	fields []hpack.HeaderField
	body   []byte
	decode *hpack.Decoder
	nextID uint32
	begun  map[uint32]*call
	got    *tally
	end    time.Time
	free   []*call
}

// call is a request under way.
type call struct {
	start  time.Time
	status bool // 200
	grpc   bool // status 0
	bytes  int
}

func newH2Client(c net.Conn, o Order) (speaker, error) {
	h := &h2Client{h2Conn: newH2Conn(c), o: o, nextID: 1, begun: make(map[uint32]*call)}
	method, more := "GET", []hpack.HeaderField{{Name: "user-agent", Value: "bench/1.0"}, {Name: "accept", Value: "*/*"}}
	if o.Kind == GRPC {
		h.body = grpcMessage(max(o.Body, 16))
		method, more = "POST", []hpack.HeaderField{
			{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}, {Name: "user-agent", Value: "bench/1.0"},
		}
	}
	h.fields = append([]hpack.HeaderField{
		{Name: ":method", Value: method}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: o.Host}, {Name: ":path", Value: o.Path},
	}, more...)
	h.decode = hpack.NewDecoder(4096, nil)
	h.out = append(h.out, http2.ClientPreface...)
	h.settings()
	return h, h.flush()
}

// grpcMessage is a message of n bytes in its frame.
func grpcMessage(n int) []byte {
	b := binary.BigEndian.AppendUint32([]byte{0}, uint32(n))
	return append(b, pattern(n)...)
}

func (h *h2Client) once() error {
	var got tally
	h.got, h.end = &got, time.Time{}
	h.begin()
	return h.loop()
}

func (h *h2Client) speak(end time.Time, got *tally) error {
	h.got, h.end = got, end
	for range max(h.o.Streams, 1) {
		h.begin()
	}
	return h.loop()
}

// begin appends one request. The connection's window is never short: what the streams have under way is less.
func (h *h2Client) begin() {
	id := h.nextID
	h.nextID += 2
	c := &call{}
	if n := len(h.free); n > 0 {
		c, h.free = h.free[n-1], h.free[:n-1]
	}
	*c = call{start: time.Now()}
	h.begun[id] = c
	if h.body == nil {
		h.headers(id, h.fields, http2.FlagHeadersEndStream)
		return
	}
	h.headers(id, h.fields, 0)
	h.data(id, h.body, true)
}

// loop reads answers, and begins a request for each that came before the end, until none is under way.
func (h *h2Client) loop() error {
	for len(h.begun) > 0 {
		if h.window < 0 {
			return errors.New("the connection's window is overdrawn")
		}
		if err := h.flush(); err != nil {
			return err
		}
		if err := h.fill(); err != nil {
			return fmt.Errorf("wait for a response: %w", err)
		}
		for {
			f, p, ok, err := h.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := h.take(f, p); err != nil {
				return err
			}
		}
	}
	return h.flush()
}

func (h *h2Client) take(f http2.FrameHeader, p []byte) error {
	if mine, err := h.keep(f, p); mine || err != nil {
		return err
	}
	c := h.begun[f.StreamID]
	if c == nil {
		return fmt.Errorf("%v frame of stream %d, which is not under way", f.Type, f.StreamID)
	}
	var ends bool
	switch f.Type {
	case http2.FrameRSTStream:
		return fmt.Errorf("stream %d was reset: %v", f.StreamID, http2.ErrCode(binary.BigEndian.Uint32(p)))
	case http2.FrameContinuation:
		return errors.New("headers longer than a frame")
	case http2.FrameData:
		c.bytes += len(p)
		ends = f.Flags&http2.FlagDataEndStream != 0
	case http2.FrameHeaders:
		if err := h.read(c, unpadded(f, p)); err != nil {
			return err
		}
		ends = f.Flags&http2.FlagHeadersEndStream != 0
	}
	if !ends {
		return nil
	}
	if !c.status || h.o.Kind == GRPC && !c.grpc {
		return fmt.Errorf("stream %d ended without success: status 200 %v, gRPC status 0 %v", f.StreamID, c.status, c.grpc)
	}
	delete(h.begun, f.StreamID)
	now := time.Now()
	h.got.took, h.got.bytes = append(h.got.took, now.Sub(c.start)), h.got.bytes+int64(c.bytes+len(h.body))
	h.free = append(h.free, c)
	if now.Before(h.end) {
		h.begin()
	}
	return nil
}

// read takes in a response's header block.
func (h *h2Client) read(c *call, block []byte) error {
	h.decode.SetEmitFunc(func(f hpack.HeaderField) {
		switch f.Name {
		case ":status":
			c.status = f.Value == "200"
		case "grpc-status":
			c.grpc = f.Value == "0"
		}
	})
	if _, err := h.decode.Write(block); err != nil {
		return fmt.Errorf("response headers: %w", err)
	}
	return h.decode.Close()
}
