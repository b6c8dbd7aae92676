package record

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
)

// Alert is an alert of RFC 8446, 6.
type Alert uint8

// Alerts that this package sends, or gives a meaning to.
const (
	CloseNotify       Alert = 0
	UnexpectedMessage Alert = 10
	BadRecordMAC      Alert = 20
	RecordOverflow    Alert = 22
	IllegalParameter  Alert = 47
	DecodeError       Alert = 50
	UserCanceled      Alert = 90
	InternalError     Alert = 80
)

// Error says that the peer broke the protocol, and the alert that tells it so.
type Error struct {
	Alert  Alert
	Reason string
}

func (e *Error) Error() string { return "tls: " + e.Reason }

func errorf(a Alert, format string, args ...any) error {
	return &Error{a, fmt.Sprintf(format, args...)}
}

const (
	maxUseless   = 16       // records in a row that carry no data, as crypto/tls has it
	maxHandshake = 64 << 10 // bytes of a handshake message, likewise
)

// Opener is the receiving half of a connection.
type Opener struct {
	d       direction
	role    Role
	useless int
	err     error // what ended the connection

	// The handshake message that is arriving; it may be spread over records.
	msg  [5]byte // its header, and what a KeyUpdate says
	have int     // bytes of msg
	left int     // bytes of a session ticket still to be skipped

	ask    bool // the peer has used its key for long
	asked  bool
	answer bool // the peer wants us to take our next key
}

// NewOpener returns an Opener for a cipher suite and the sender's traffic secret, of which it keeps a copy. The role is
// ours: only a client is sent session tickets.
func NewOpener(suite uint16, secret []byte, role Role) (*Opener, error) {
	d, err := newDirection(suite, secret)
	if err != nil {
		return nil, err
	}
	return &Opener{d: d, role: role}, nil
}

// Owed says what receiving left to send.
type Owed uint8

// What may be owed.
const (
	Nothing   Owed = iota
	Update         // a key update
	AskUpdate      // a key update that asks for one
)

func (o Owed) String() string {
	switch o {
	case Nothing:
		return "nothing"
	case Update:
		return "update"
	case AskUpdate:
		return "ask for update"
	}
	return "unknown"
}

// Owed returns what is to be sent, once.
func (o *Opener) Owed() Owed {
	switch {
	case o.ask:
		o.ask, o.answer = false, false
		return AskUpdate
	case o.answer:
		o.answer = false
		return Update
	}
	return Nothing
}

// Length is how long the record is of which rec holds the header.
func Length(header []byte) int {
	return HeaderBytes + int(header[3])<<8 + int(header[4])
}

// CheckHeader judges a record by its first bytes, before its body is waited for. That the record carries TLS 1.2 for its
// version means nothing (RFC 8446, 5.1). After the handshake there are no unprotected records, not even a
// ChangeCipherSpec (RFC 8446, 5).
func CheckHeader(header []byte) error {
	if header[0] != typeData {
		return errorf(UnexpectedMessage, "received unprotected record of type %d", header[0])
	}
	if n := Length(header) - HeaderBytes; n > maxCiphertext {
		return errorf(RecordOverflow, "received record of %d bytes", n)
	}
	return nil
}

// Open opens one whole record and returns how many bytes of application data it wrote to dst, which must have OpenRoom
// and may be rec's own memory behind the header, but must not overlap it otherwise. Bytes of dst beyond the data may be
// overwritten. Zero bytes without an error are a record that brought none. io.EOF is the peer's close_notify; an *Error
// is a fault of the peer; an alert of the peer is a *net.OpError holding a tls.AlertError, as crypto/tls has it. After
// an error nothing can be opened.
func (o *Opener) Open(dst, rec []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	n, err := o.open(dst, rec)
	if err != nil {
		o.err = err
	}
	return n, err
}

func (o *Opener) open(dst, rec []byte) (int, error) {
	header, body := rec[:HeaderBytes], rec[HeaderBytes:]
	if err := CheckHeader(header); err != nil {
		return 0, err
	}
	if Length(header) != len(rec) || len(body) < tagBytes {
		return 0, errorf(BadRecordMAC, "received record of %d bytes", len(body))
	}
	if !o.d.nextNonce() {
		return 0, errSequence
	}
	inner, err := o.d.aead.Open(dst[:0:len(body)-tagBytes], o.d.nonce[:], body, header)
	if err != nil {
		return 0, errorf(BadRecordMAC, "received record that fails authentication")
	}
	if len(inner) > MaxPlaintext+1 {
		return 0, errorf(RecordOverflow, "received record with %d bytes of content", len(inner))
	}
	// The content type is the last byte that is not padding, RFC 8446, 5.4.
	n := len(inner) - 1
	for n >= 0 && inner[n] == 0 {
		n--
	}
	if n < 0 {
		return 0, errorf(UnexpectedMessage, "received record without content type")
	}
	typ, content := inner[n], inner[:n]
	if o.d.seq >= askAfter && !o.asked {
		o.ask, o.asked = true, true
	}
	if typ == typeData && n > 0 {
		if o.have > 0 || o.left > 0 {
			return 0, errInterleaved
		}
		o.useless = 0
		return n, nil
	}
	if o.useless++; o.useless > maxUseless {
		return 0, errorf(UnexpectedMessage, "received too many records without data")
	}
	return 0, o.other(typ, content)
}

// errInterleaved is RFC 8446, 5.1: nothing comes between the records of a handshake message.
var errInterleaved = &Error{UnexpectedMessage, "received another record within a handshake message"}

// other handles a record without application data.
func (o *Opener) other(typ byte, content []byte) error {
	if typ != typeHandshake && (o.have > 0 || o.left > 0) {
		return errInterleaved
	}
	switch typ {
	case typeData:
		return nil // empty ones are allowed, RFC 8446, 5.1
	case typeAlert:
		return o.alert(content)
	case typeHandshake:
		return o.handshake(content)
	}
	return errorf(UnexpectedMessage, "received record with content type %d", typ)
}

// alert is RFC 8446, 6: the level means nothing.
func (o *Opener) alert(content []byte) error {
	if len(content) != 2 {
		return errorf(DecodeError, "received alert of %d bytes", len(content))
	}
	switch a := Alert(content[1]); a {
	case CloseNotify:
		return io.EOF
	case UserCanceled:
		return nil // close_notify follows
	default:
		return &net.OpError{Op: "remote error", Err: tls.AlertError(a)}
	}
}

// handshake takes a piece of the handshake messages that come after the handshake.
func (o *Opener) handshake(b []byte) error {
	if len(b) == 0 {
		return errorf(UnexpectedMessage, "received empty handshake record")
	}
	for len(b) > 0 {
		if o.left > 0 {
			n := min(len(b), o.left)
			o.left -= n
			b = b[n:]
			continue
		}
		need := 4
		if o.have >= 4 {
			need = 5 // the one byte of a KeyUpdate
		}
		n := copy(o.msg[o.have:need], b)
		o.have += n
		b = b[n:]
		if o.have < need {
			return nil
		}
		if need == 4 {
			if err := o.message(); err != nil {
				return err
			}
			continue
		}
		o.have = 0
		if len(b) > 0 { // a key changes between records, RFC 8446, 5.1
			return errorf(UnexpectedMessage, "received message behind a key update")
		}
		if err := o.update(o.msg[4]); err != nil {
			return err
		}
	}
	return nil
}

// message looks at the header of a handshake message.
func (o *Opener) message() error {
	n := int(o.msg[1])<<16 | int(o.msg[2])<<8 | int(o.msg[3])
	switch typ := o.msg[0]; {
	case typ == msgKeyUpdate && n != 1:
		return errorf(DecodeError, "received key update of %d bytes", n)
	case typ == msgKeyUpdate:
		return nil
	case typ == msgNewSessionTicket && o.role == Client && n > maxHandshake:
		return errorf(DecodeError, "received session ticket of %d bytes", n)
	case typ == msgNewSessionTicket && o.role == Client && n > 0:
		o.have, o.left = 0, n // we resume nothing
		return nil
	default:
		return errorf(UnexpectedMessage, "received handshake message of type %d and %d bytes", typ, n)
	}
}

// update is RFC 8446, 4.6.3: the peer's next record is under its next key.
func (o *Opener) update(request byte) error {
	if request > 1 {
		return errorf(IllegalParameter, "received key update with request %d", request)
	}
	o.answer = o.answer || request == 1
	o.ask, o.asked = false, false
	return o.d.next()
}

// Wipe overwrites the secrets; the Opener is of no more use.
func (o *Opener) Wipe() {
	if o.err == nil {
		o.err = net.ErrClosed
	}
	o.d.wipe()
}
