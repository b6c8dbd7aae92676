package http2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/net/http2"
)

// Sizes and limits.
const (
	frameHeaderBytes = 9 // RFC 9113, 4.1

	recvStreamWindow = 256 << 10
	recvConnWindow   = 4 << 20
	maxConnBuffered  = 32 << 20 // beyond this the connection window stays shut until streams are read
	leastUpdate      = 16 << 10 // of the connection's window: less is not worth a frame
	maxKept          = 64 << 10 // of a request body, for a second try
	recvMaxFrame     = 16384    // RFC 9113, 6.5.2: the least there is

	defaultWindow = 65535 // RFC 9113, 6.9.2
	maxWindow     = 1<<31 - 1
	maxStreamID   = 1<<31 - 1

	maxHeadList      = 60 << 10  // of a header list, as RFC 9113, 6.5.2 counts
	maxBlockBytes    = 128 << 10 // of its block: what lies between is decoded, and refused with 431
	maxContinuations = 32
	maxSettingsFrame = 4 << 10
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

// appendHeaders appends a header block as HEADERS and, beyond the peer's frame size, CONTINUATION frames.
func appendHeaders(b []byte, stream uint32, block []byte, end bool, maxFrame int) []byte {
	typ, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for {
		n := min(len(block), maxFrame)
		if n == len(block) {
			flags |= http2.FlagHeadersEndHeaders // CONTINUATION's is the same
		}
		b = appendFrameHeader(b, n, typ, flags, stream)
		b = append(b, block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return b
		}
		typ, flags = http2.FrameContinuation, 0
	}
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

// resetError is why a stream ended: RST_STREAM (RFC 9113, 5.4.2).
type resetError struct {
	code   http2.ErrCode
	remote bool
}

func (e *resetError) Error() string {
	if e.remote {
		return "http2: stream reset by peer: " + e.code.String()
	}
	return "http2: stream reset: " + e.code.String()
}
