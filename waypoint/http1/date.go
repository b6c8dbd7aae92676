package http1

import (
	"sync/atomic"
	"time"
)

// Date is the Date of responses (RFC 9110, 6.6.1), written out once a second. The zero value is ready; safe for concurrent use.
type Date struct{ last atomic.Pointer[written] }

type written struct {
	second int64
	text   [len(dateLayout)]byte
}

const dateLayout = "Mon, 02 Jan 2006 15:04:05 GMT"

// Append appends the present time.
func (d *Date) Append(b []byte) []byte {
	now := time.Now()
	w := d.last.Load()
	if w == nil || w.second != now.Unix() {
		w = &written{second: now.Unix()}
		now.UTC().AppendFormat(w.text[:0], dateLayout)
		d.last.Store(w)
	}
	return append(b, w.text[:]...)
}
