package http1

import (
	"errors"
	"io"
)

// Translator changes a body on its way. What it returns is valid until its next call, and nothing it is given may be kept or changed.
type Translator interface {
	// Translate returns what goes on instead of the beginning of p, perhaps nothing yet, and how much of p that is: more than nothing.
	Translate(p []byte) (out []byte, used int, err error)
	// End returns what goes on behind the last piece, instead of trailers.
	End(trailers *Fields) (out []byte, err error)
	// Restart forgets all: the body is read again from its beginning.
	Restart()
}

// translation is a body's translator and how far it is.
type translation struct {
	by    Translator
	rest  []byte // of a piece
	count int64  // bytes handed out
	over  bool   // End was called
}

func (v *translation) done() bool { return v.over && len(v.rest) == 0 }

// Through makes t change what Next hands out from here on. The length is not known any more, and trailers do not go on. Whoever looks at
// what is here (Buffer, Keeps) sees it as it came; a Tap sees a request translated, a response as it came. A body that there is none of
// is not translated. Nil ends it: what is left can be read as it came, whatever the translator found.
func (b *Body) Through(t Translator) {
	if t == nil {
		if e, ok := errors.AsType[*Error](b.err); ok && e.Reason == BadContent {
			b.err = nil
		}
		b.via = nil
		return
	}
	if b.phase == done && b.count == 0 && b.Trailers().Len() == 0 {
		return
	}
	b.via = &translation{by: t}
}

func (b *Body) restart(v *translation) {
	if b.via = v; v == nil {
		return
	}
	v.by.Restart()
	*v = translation{by: v.by}
}

// Passed are the trailers that go on: those that there are, unless a Translator was given them.
func (b *Body) Passed() *Fields {
	if b.via != nil {
		return &noFields
	}
	return b.Trailers()
}

// noFields are never written.
var noFields Fields

// framing is how the body that goes on ends.
func (b *Body) framing() (framing, int64) {
	if b.via != nil {
		return bodyChunked, 0
	}
	return b.kind, b.size
}

// translated is Next of a body that is changed.
func (b *Body) translated() ([]byte, error) {
	for v := b.via; ; {
		p, err := b.translate(v)
		switch {
		case err == io.EOF:
			return nil, io.EOF
		case err != nil:
			return nil, err
		case len(p) == 0:
			continue
		}
		if b.tap != nil && b.role == ofRequest {
			b.tap.See(p, v.count)
		}
		v.count += int64(len(p))
		return p, nil
	}
}

func (b *Body) translate(v *translation) ([]byte, error) {
	if len(v.rest) > 0 {
		p, n, err := v.by.Translate(v.rest)
		v.rest = v.rest[n:]
		return p, b.untranslated(err)
	}
	if v.over {
		return nil, io.EOF
	}
	tap := b.tap
	if b.role == ofRequest {
		b.tap = nil // it sees what comes of it
	}
	p, err := b.received()
	b.tap = tap
	if err == io.EOF {
		v.over = true
		p, err = v.by.End(b.Trailers())
		return p, b.untranslated(err)
	}
	v.rest = p
	return nil, err
}

// untranslated says whose fault it is that a body cannot be translated.
func (b *Body) untranslated(err error) error {
	if err == nil {
		return nil
	}
	b.err = fail(UpstreamBroken, err)
	if b.role == ofRequest {
		b.err = fail(BadContent, err)
	}
	return b.err
}
