package grpcweb

import (
	"encoding/base64"
	bigendian "encoding/binary"
	"strings"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// Encoder puts the trailers of a response behind its messages, and all in base64 if it is Text: each message, like the trailers, to the
// end of its padding, so that a client can read it when it comes. It is an http1.Translator.
type Encoder struct {
	Text bool

	head    [5]byte // of the message that passes: a flag and a length
	have    int     // of head
	left    uint32  // of the message
	pending [3]byte // bytes that are not three yet
	pends   int
	out     []byte
}

// trailersFlag is that of a message that is the trailers.
const trailersFlag = 0x80

// Translate implements http1.Translator.
func (e *Encoder) Translate(p []byte) (out []byte, used int, err error) {
	if !e.Text {
		return p, len(p), nil
	}
	if e.out == nil {
		e.out = make([]byte, 0, bufferBytes)
	}
	e.out = e.out[:0]
	for used < len(p) {
		room := (cap(e.out)-len(e.out))/4*3 - 2*len(e.pending) // with what pends and what pads
		if room <= 0 {
			break
		}
		n := min(len(p)-used, room)
		if e.have < len(e.head) {
			n = copy(e.head[e.have:], p[used:used+n])
			if e.have += n; e.have == len(e.head) {
				e.left = bigendian.BigEndian.Uint32(e.head[1:])
			}
		} else {
			n = int(min(uint64(n), uint64(e.left)))
			e.left -= uint32(n)
		}
		e.put(p[used : used+n])
		if used += n; e.have == len(e.head) && e.left == 0 {
			e.have = 0
			e.pad()
		}
	}
	return e.out, used, nil
}

// put encodes bytes, up to two of which pend.
func (e *Encoder) put(p []byte) {
	if e.pends > 0 {
		n := copy(e.pending[e.pends:], p)
		p = p[n:]
		if e.pends += n; e.pends < len(e.pending) {
			return
		}
		e.pad()
	}
	n := len(p) / 3 * 3
	e.out = base64.StdEncoding.AppendEncode(e.out, p[:n])
	e.pends = copy(e.pending[:], p[n:])
}

// pad encodes what pends.
func (e *Encoder) pad() {
	e.out = base64.StdEncoding.AppendEncode(e.out, e.pending[:e.pends])
	e.pends = 0
}

// End implements http1.Translator: the trailers, if there are any, as the last message, with names in lower case.
func (e *Encoder) End(trailers *http1.Fields) ([]byte, error) {
	e.out = e.out[:0]
	e.pad() // of a message that was cut
	if trailers.Len() == 0 {
		return e.out, nil
	}
	block := make([]byte, len(e.head), len(e.head)+trailers.Size())
	block[0] = trailersFlag
	for name, value := range trailers.All() {
		block = append(block, strings.ToLower(name)...)
		block = append(block, ':')
		block = append(block, value...)
		block = append(block, '\r', '\n')
	}
	bigendian.BigEndian.PutUint32(block[1:], uint32(len(block)-len(e.head)))
	if !e.Text {
		return block, nil
	}
	e.out = base64.StdEncoding.AppendEncode(e.out, block)
	return e.out, nil
}

// Restart implements http1.Translator.
func (e *Encoder) Restart() { *e = Encoder{Text: e.Text, out: e.out} }
