package hbone

import (
	"crypto/tls"
	"errors"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

// records is how a connection's bytes become TLS records and back, once the handshake is over. Reading is for the
// reader goroutine, everything else for whoever holds the writer's role.
type records interface {
	// read appends to buf[:n] what one record brings, and returns the new n; it may bring nothing. It waits for a whole
	// record. buf has record.OpenRoom behind n.
	read(buf []byte, n int) (int, error)
	// owed returns what reading left to send, once.
	owed() record.Owed
	// seal collects a and then b as records of application data.
	seal(a, b []byte) error
	// update collects a key update.
	update(o record.Owed) error
	// alert collects an alert, after which nothing can be sealed.
	alert(a record.Alert) error
	// idle gives up memory that only writing needs.
	idle()
	// stopReading and stopWriting forget the secrets of one direction, which is over.
	stopReading()
	stopWriting()
}

// newRecords chooses how the connection goes on after its handshake: with records of our own, if log caught its
// secrets and the cipher is AES-GCM, else with crypto/tls as before. It wipes log.
//
// Nothing is lost between the two. crypto/tls was given the bytes of one record at a time, so it has read none beyond
// the peer's Finished; it has written none behind ours, for a server that may send session tickets is not asked for its
// secrets. Both directions stand at the first record under the application's keys.
func newRecords(bc *batchConn, tc *tls.Conn, role record.Role, log *record.Secrets) records {
	if bc.left == 0 && bc.hn == 0 {
		if sealer, opener, ok := log.Take(role, tc.ConnectionState()); ok {
			return &ownRecords{bc: bc, sealer: sealer, opener: opener}
		}
	}
	log.Wipe()
	return &stdRecords{bc: bc, tls: tc}
}

// ownRecords decrypts from the connection's input slab into the reader's buffer and encrypts into the output slab.
type ownRecords struct {
	bc     *batchConn
	sealer *record.Sealer
	opener *record.Opener
}

func (r *ownRecords) read(buf []byte, n int) (int, error) {
	rec, err := r.bc.record()
	if err != nil {
		return n, err
	}
	k, err := r.opener.Open(buf[n:], rec)
	r.bc.recordDone()
	return n + k, err
}

func (r *ownRecords) owed() record.Owed { return r.opener.Owed() }

func (r *ownRecords) seal(a, b []byte) (err error) {
	r.bc.out, err = r.sealer.Seal(r.bc.output(), a, b)
	return err
}

func (r *ownRecords) update(o record.Owed) (err error) {
	r.bc.out, err = r.sealer.Update(r.bc.output(), o == record.AskUpdate)
	return err
}

func (r *ownRecords) alert(a record.Alert) (err error) {
	r.bc.out, err = r.sealer.Alert(r.bc.output(), a)
	return err
}

func (r *ownRecords) idle() {}

func (r *ownRecords) stopReading() { r.opener.Wipe() }

func (r *ownRecords) stopWriting() { r.sealer.Wipe() }

// stdRecords leaves records to crypto/tls. It answers key updates by itself and never starts one.
type stdRecords struct {
	bc    *batchConn
	tls   *tls.Conn
	first []byte // slab for the first record of a large frame
}

func (r *stdRecords) read(buf []byte, n int) (int, error) {
	k, err := r.tls.Read(buf[n:])
	return n + k, err
}

func (r *stdRecords) owed() record.Owed { return record.Nothing }

func (r *stdRecords) seal(a, b []byte) error {
	if len(a) > 0 && len(b) > 0 {
		if r.first == nil {
			r.first = largeSlabs.Get()
		}
		k := min(len(b), record.MaxPlaintext-len(a))
		joined := append(append(r.first[:0], a...), b[:k]...)
		if _, err := r.tls.Write(joined); err != nil {
			return err
		}
		a, b = nil, b[k:]
	}
	for _, p := range [...][]byte{a, b} {
		if len(p) > 0 {
			if _, err := r.tls.Write(p); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *stdRecords) update(record.Owed) error { return nil }

// alert can say that all is well; other alerts are crypto/tls's own affair.
func (r *stdRecords) alert(a record.Alert) error {
	if a != record.CloseNotify {
		return nil
	}
	return r.tls.CloseWrite()
}

func (r *stdRecords) idle() {
	if r.first != nil {
		largeSlabs.Put(r.first)
		r.first = nil
	}
}

func (r *stdRecords) stopReading() {}

func (r *stdRecords) stopWriting() {}

// alertFor is the last thing to tell a peer whose connection ends with err, if there is one: what was wrong with its
// records, or that we leave too (RFC 8446, 6.1).
func alertFor(err error) (record.Alert, bool) {
	if e, ok := errors.AsType[*record.Error](err); ok {
		return e.Alert, true
	}
	return record.CloseNotify, errors.Is(err, ErrPeerClosed)
}
