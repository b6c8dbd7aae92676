package http1

import (
	"errors"
	"io"
	"os"
)

// Body hands out a message's body piece by piece, straight from the connection's buffer.
type Body struct {
	in    *reader
	src   Source // instead of in: the body comes from elsewhere
	sized bool   // size is declared, whatever kind is; of one that comes from elsewhere
	role  role
	kind  framing
	phase phase
	size  int64 // declared; of bodyLength
	left  int64 // of the body, or of the chunk
	count int64 // handed out so far
	extra int   // bytes of chunk extensions so far
	err   error // sticky
	tap   Tap
	via   *translation // nil: it goes on as it is

	trailers Fields
}

// Tap looks at a body that passes. What is read again after a Rewind it sees again.
type Tap interface {
	// See is given the next piece, which it must not keep or change, and how many bytes of the body came before it.
	See(p []byte, at int64)
}

// Tap makes t see what Next hands out from here on; nil ends that.
func (b *Body) Tap(t Tap) { b.tap = t }

type role uint8

const (
	ofRequest role = iota
	ofResponse
)

type phase uint8

const (
	inSize phase = iota
	inData
	inDataEnd
	inTrailers
	done
)

// Bounds of what surrounds chunks.
const (
	maxChunkLine     = 256
	maxChunkDigits   = 15
	maxExtraBytes    = 16 << 10
	maxTrailerBytes  = 8 << 10
	maxTrailerFields = 32
)

var errChunk = errors.New("a chunk is malformed")

func (b *Body) begin(in *reader, as role, kind framing, size int64) {
	b.in, b.src, b.role, b.kind, b.size, b.left, b.count, b.extra, b.err, b.via = in, nil, as, kind, size, size, 0, 0, nil, nil
	b.trailers.reset()
	if in.forget(); as == ofRequest && kind != bodyNone {
		in.mark()
	}
	in.left.Store(size)
	switch {
	case kind == bodyChunked:
		b.phase, b.left = inSize, 0
	case kind == bodyNone, kind == bodyLength && size == 0:
		b.phase = done
	default:
		b.phase = inData
	}
}

// Len is the declared length in bytes: 0 without a body, -1 if only its end will tell.
func (b *Body) Len() int64 {
	switch kind, size := b.framing(); kind {
	case bodyNone:
		return 0
	case bodyLength:
		return size
	default:
		return -1
	}
}

// Bytes is how many bytes of the body were handed out. While an exchange sends the body it must not be asked.
func (b *Body) Bytes() int64 {
	if b.via != nil && b.role == ofResponse {
		return b.via.count
	}
	return b.count
}

// Trailers are the fields behind a chunked body once Next returned io.EOF; those that may change the meaning of what
// was already passed on are left out (RFC 9110, 6.5.1).
func (b *Body) Trailers() *Fields {
	if b.src != nil {
		return b.src.Trailers()
	}
	return &b.trailers
}

// Done reports whether the body was read to its end.
func (b *Body) Done() bool { return b.phase == done && b.err == nil && (b.via == nil || b.via.done()) }

// Next returns the next piece, never empty, valid until the next call; io.EOF at the end, or an *Error.
func (b *Body) Next() ([]byte, error) {
	if b.err != nil {
		return nil, b.err
	}
	if b.via != nil {
		return b.translated()
	}
	return b.received()
}

// received is Next of the body as it came.
func (b *Body) received() ([]byte, error) {
	if b.src != nil {
		return b.nextFrom()
	}
	p, err := b.next()
	if errors.Is(err, errWouldWait) {
		return nil, errWouldWait
	}
	if err == nil || err == io.EOF {
		if b.tap != nil && len(p) > 0 {
			b.tap.See(p, b.count-int64(len(p)))
		}
		return p, err
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return nil, e // of the writer that was flushed; the body itself goes on
	}
	b.err = b.blame(err)
	return nil, b.err
}

func (b *Body) next() ([]byte, error) {
	for {
		switch b.phase {
		case inSize:
			line, err := b.in.line(maxChunkLine)
			if err != nil {
				return nil, unexpected(err)
			}
			n, digits, ok := chunkSize(line)
			if b.extra += len(line) - digits; !ok || b.extra > maxExtraBytes {
				return nil, errChunk
			}
			b.left, b.phase = n, inData
			if n == 0 {
				b.phase = inTrailers
			}
		case inData:
			p, err := b.take()
			if err != nil || p != nil {
				return p, err
			}
		case inDataEnd:
			for len(b.in.buffered()) < 2 {
				if err := b.in.fill(); err != nil {
					return nil, unexpected(err)
				}
			}
			if e := b.in.buffered(); e[0] != '\r' || e[1] != '\n' {
				return nil, errChunk
			}
			b.in.r += 2
			b.phase = inSize
		case inTrailers:
			if err := b.in.readHead(&b.trailers, limits{maxTrailerBytes, maxTrailerFields}, trailerSection); err != nil {
				return nil, &trailerError{unexpected(err)}
			}
			b.phase = done
		case done:
			return nil, io.EOF
		}
	}
}

// take returns what the buffer has of the body or the chunk, after waiting for some if need be; neither a piece nor an
// error at the end of a body that the connection's end ends.
func (b *Body) take() ([]byte, error) {
	if b.in.r == b.in.w {
		if err := b.in.fill(); err != nil {
			if err == io.EOF && b.kind == bodyToClose {
				b.phase = done
				return nil, nil
			}
			return nil, unexpected(err)
		}
	}
	p := b.in.buffered()
	if b.kind != bodyToClose {
		if int64(len(p)) > b.left {
			p = p[:b.left]
		}
		b.left -= int64(len(p))
		if b.kind == bodyLength {
			b.in.left.Store(b.left)
		}
		if b.left == 0 {
			b.phase = done
			if b.kind == bodyChunked {
				b.phase = inDataEnd
			}
		}
	}
	b.in.r += len(p)
	b.count += int64(len(p))
	return p, nil
}

// chunkSize reads the line before a chunk (RFC 9112, 7.1) and returns how much of it is the size.
func chunkSize(line []byte) (n int64, digits int, ok bool) {
	for digits < len(line) && class[line[digits]]&isHex != 0 {
		c := toLower(line[digits])
		if c >= 'a' {
			c -= 'a' - 10
		} else {
			c -= '0'
		}
		n = n<<4 | int64(c)
		if digits++; digits > maxChunkDigits {
			return 0, digits, false
		}
	}
	ext := line[digits:]
	return n, digits, digits > 0 && (len(ext) == 0 || ext[0] == ';' && all(ext, inValue))
}

// Buffered reports whether the whole body is in the buffer, so that reading it will not wait. It looks through it, and
// returns the error it finds.
func (b *Body) Buffered() (bool, error) { return b.Buffer(0) }

// Keeps reports whether the whole body is in the buffer, and stays there when it is read: Rewind will succeed. It does not wait.
func (b *Body) Keeps() (bool, error) {
	whole, err := b.Buffered()
	return whole && (b.kind == bodyNone || b.src != nil && b.src.Keeps() || b.src == nil && b.in.keeps()), err
}

// Buffer waits until the whole body is in the buffer, or n bytes as they are on the wire (a buffer holds little more than
// 60 KiB), and reports whether it is the whole. The body is then read from where it was, and rewound if it was not read
// yet: for filters that look at it, and for second tries. A client that waits for it must be told to Continue before.
func (b *Body) Buffer(n int) (bool, error) {
	if b.err != nil || b.kind == bodyNone || b.phase == done {
		return b.err == nil, b.err
	}
	if b.src != nil {
		return b.src.Buffer(n)
	}
	in, was, fresh := b.in, *b, b.count == 0 && b.in.kept.at == b.in.r && b.in.keeps()
	base, whole := in.r, false
	for {
		err := b.look()
		if err == io.EOF {
			whole = true
			break
		}
		if err != errWouldWait {
			return false, err
		}
		if in.w-base >= n {
			break
		}
		ahead := in.r - base // what was looked at must not be lost to what comes
		in.r = base
		err = in.fill()
		base = in.r
		in.r = base + ahead
		if errors.Is(err, errTooLarge) {
			break
		}
		if err != nil {
			b.err = b.blame(unexpected(err))
			return false, b.err
		}
	}
	was.trailers.list = b.trailers.list[:0] // its memory, for later
	*b = was
	in.r = base
	in.left.Store(b.left)
	if fresh {
		in.mark()
	}
	return whole, nil
}

// look reads what is in the buffer, to errWouldWait or its end.
func (b *Body) look() error {
	b.in.still, b.tap, b.via = true, nil, nil // Buffer restores them
	defer func() { b.in.still = false }()
	for {
		if _, err := b.Next(); err != nil {
			return err
		}
	}
}

// Rewind goes back to the body's beginning, for a second try; false once more has come of it than a buffer holds, or an Exchange has
// begun to respond. It need not have come whole.
func (b *Body) Rewind() bool {
	if b.kind == bodyNone {
		return true
	}
	if b.src != nil {
		return b.rewindFrom()
	}
	if b.err != nil || !b.in.recall() {
		return false
	}
	via := b.via
	b.begin(b.in, b.role, b.kind, b.size)
	b.restart(via)
	return true
}

// unexpected turns the end of the connection into one that came too early.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// trailerError is a fault found behind the body.
type trailerError struct{ error }

func (e *trailerError) Unwrap() error { return e.error }

// blame says what a failure to read the body means.
func (b *Body) blame(err error) *Error {
	slow := errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, errSlow)
	malformed := malformed(err)
	if b.role == ofResponse {
		switch {
		case slow:
			return fail(UpstreamTimeout, err)
		case malformed:
			return fail(UpstreamBroken, err)
		}
		return fail(UpstreamCut, err)
	}
	_, trailer := errors.AsType[*trailerError](err)
	switch {
	case slow:
		return fail(BodyTimeout, err)
	case malformed && trailer:
		return fail(BadTrailer, err)
	case malformed:
		return fail(BadChunk, err)
	}
	return fail(ClientClosed, err)
}

// malformed reports whether the peer wrote what it must not, rather than stopped to write.
func malformed(err error) bool {
	for _, is := range [...]error{errBareLF, errFold, errName, errValue, errControl, errManyFields, errTooLarge, errChunk} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}
