package grpcweb

import (
	"bytes"
	"encoding/base64"
	"errors"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// Decoder takes the base64 off a request's body. Padding may stand wherever a piece ended that a client encoded by itself; at the end
// it must not be missing. The zero value is ready. It is an http1.Translator.
type Decoder struct {
	quad [4]byte // letters that are not four yet
	have int
	out  []byte
}

// errBase64 is of a body that is not what its type says.
var errBase64 = errors.New("no base64")

// strict refuses what could have been written otherwise.
var strict = base64.StdEncoding.Strict()

// Translate implements http1.Translator.
func (d *Decoder) Translate(p []byte) (out []byte, used int, err error) {
	if d.out == nil {
		d.out = make([]byte, bufferBytes/4*3)
	}
	if d.have > 0 || len(p) < len(d.quad) {
		used = copy(d.quad[d.have:], p)
		if d.have += used; d.have < len(d.quad) {
			return nil, used, nil
		}
		d.have = 0
		n, err := decode(d.out, d.quad[:])
		return d.out[:n], used, err
	}
	p = p[:min(len(p)/4*4, bufferBytes)]
	n := 0
	for used < len(p) {
		piece := p[used:]
		if i := bytes.IndexByte(piece, '='); i >= 0 {
			piece = piece[:i/4*4+4]
		}
		m, err := decode(d.out[n:], piece)
		if n += m; err != nil {
			return d.out[:n], used, err
		}
		used += len(piece)
	}
	return d.out[:n], used, nil
}

// decode decodes letters of which only the last may be padding. The library passes over ends of lines, which are none.
func decode(out, letters []byte) (int, error) {
	n, err := strict.Decode(out, letters)
	padding := 0
	for i := len(letters) - 1; i >= 0 && letters[i] == '='; i-- {
		padding++
	}
	if err != nil || n != len(letters)/4*3-padding {
		return n, errBase64
	}
	return n, nil
}

// End implements http1.Translator. Trailers of a request mean nothing to gRPC.
func (d *Decoder) End(*http1.Fields) ([]byte, error) {
	if d.have > 0 {
		return nil, errBase64
	}
	return nil, nil
}

// Restart implements http1.Translator.
func (d *Decoder) Restart() { d.have = 0 }
