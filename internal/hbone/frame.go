package hbone

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/net/http2"
)

// Sizes and limits. Windows, frame size and header limits are those of Istio's ztunnel, so that both sides of a mixed
// mesh behave alike.
const (
	frameHeaderBytes = 9 // RFC 9113, 4.1

	recvStreamWindow = 4 << 20
	recvConnWindow   = 16 << 20
	recvMaxFrame     = 1 << 20
	maxConnBuffered  = 64 << 20 // beyond this the connection window stays shut until streams are read

	leastUpdate = 16 << 10 // of the connection's window: less is not worth a frame

	defaultWindow   = 65535 // RFC 9113, 6.9.2
	defaultMaxFrame = 16384 // RFC 9113, 6.5.2
	maxWindow       = 1<<31 - 1
	maxStreamID     = 1<<31 - 1

	serverHeaderList = 64 << 10
	clientHeaderList = 16 << 10

	// A DATA frame of recordPayload bytes fills one TLS record exactly, one of bulkPayload bytes four. Bigger ones
	// would be held back whole by peers that deliver only complete frames.
	recordPayload = 16384 - frameHeaderBytes
	bulkPayload   = 4*16384 - frameHeaderBytes
)

// frameHeader is RFC 9113, 4.1.
type frameHeader struct {
	length int
	typ    http2.FrameType
	flags  http2.Flags
	stream uint32
}

func parseFrameHeader(b []byte) frameHeader {
	_ = b[8]
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		typ:    http2.FrameType(b[3]),
		flags:  http2.Flags(b[4]),
		stream: binary.BigEndian.Uint32(b[5:]) & maxStreamID,
	}
}

func appendFrameHeader(b []byte, length int, typ http2.FrameType, flags http2.Flags, stream uint32) []byte {
	return append(b,
		byte(length>>16), byte(length>>8), byte(length), byte(typ), byte(flags),
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendSettings(b []byte, settings ...http2.Setting) []byte {
	b = appendFrameHeader(b, 6*len(settings), http2.FrameSettings, 0, 0)
	for _, s := range settings {
		b = binary.BigEndian.AppendUint16(b, uint16(s.ID))
		b = binary.BigEndian.AppendUint32(b, s.Val)
	}
	return b
}

func appendWindowUpdate(b []byte, stream uint32, n int) []byte {
	b = appendFrameHeader(b, 4, http2.FrameWindowUpdate, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

func appendRSTStream(b []byte, stream uint32, code http2.ErrCode) []byte {
	b = appendFrameHeader(b, 4, http2.FrameRSTStream, 0, stream)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

func appendPing(b []byte, flags http2.Flags, data [8]byte) []byte {
	b = appendFrameHeader(b, 8, http2.FramePing, flags, 0)
	return append(b, data[:]...)
}

func appendGoAway(b []byte, last uint32, code http2.ErrCode) []byte {
	b = appendFrameHeader(b, 8, http2.FrameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

// connError ends the connection with GOAWAY (RFC 9113, 5.4.1).
type connError struct {
	code   http2.ErrCode
	reason string
}

func (e *connError) Error() string { return fmt.Sprintf("http2: %s: %s", e.code, e.reason) }

func connErrorf(code http2.ErrCode, format string, args ...any) error {
	return &connError{code, fmt.Sprintf(format, args...)}
}

// ResetError ends one stream: the peer, or we, sent RST_STREAM with Code (RFC 9113, 5.4.2).
type ResetError struct {
	Code   uint32 // an HTTP/2 error code, RFC 9113, 7
	Remote bool   // the peer sent it
}

func (e *ResetError) Error() string {
	if e.Remote {
		return fmt.Sprintf("hbone: stream reset by peer: %s", http2.ErrCode(e.Code))
	}
	return fmt.Sprintf("hbone: stream reset: %s", http2.ErrCode(e.Code))
}
