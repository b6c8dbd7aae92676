package http2

import (
	"io"
	"net"
	"testing"

	"golang.org/x/net/http2"
)

// TestTrailersOfAStreamBefore do not reach the one that has its memory now: who reads looks for the stream, and then, with what
// was decoded meanwhile, once more.
func TestTrailersOfAStreamBefore(t *testing.T) {
	near, far := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, far) }() // ends with near
	defer near.Close()
	c := NewClientConn(near, Config{})
	open := func() *ClientStream {
		st := c.Open()
		c.mu.Lock()
		st.beginLocked("GET", false)
		c.mu.Unlock()
		return st
	}
	one := open()
	h := frameHeader{typ: http2.FrameHeaders, flags: http2.FlagHeadersEndStream | http2.FlagHeadersEndHeaders, stream: one.id}
	s := &one.stream
	_ = one.Close()
	one.Free()
	if two := open(); two != one || two.id == h.stream {
		t.Fatal("the memory is not used again")
	}
	if err := c.trailersOf(s, h, []byte("\x00\x01x\x01y")); err != nil {
		t.Fatal(err)
	}
	if one.gotEnd || one.trailers.Len() > 0 {
		t.Errorf("stream %d ended by the trailers of stream %d: %v", one.id, h.stream, one.trailers.Len())
	}
}
