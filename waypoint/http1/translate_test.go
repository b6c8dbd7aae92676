package http1_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// doubler writes every byte twice, one at a time, and how many there were and the trailers at the end. It does not like an x.
type doubler struct {
	n   int
	out []byte
}

func (d *doubler) Translate(p []byte) ([]byte, int, error) {
	if p[0] == 'x' {
		return nil, 0, errors.New("an x")
	}
	d.n++
	if p[0] == '-' {
		return nil, 1, nil
	}
	d.out = append(d.out[:0], p[0], p[0])
	return d.out, 1, nil
}

func (d *doubler) End(trailers *http1.Fields) ([]byte, error) {
	d.out = append(d.out[:0], strings.Repeat("!", d.n)...)
	for name, value := range trailers.All() {
		d.out = append(d.out, name+"="+value...)
	}
	return d.out, nil
}

func (d *doubler) Restart() { d.n = 0 }

// heard is a Tap that keeps what it sees.
type heard []byte

func (h *heard) See(p []byte, at int64) { *h = append((*h)[:at], p...) }

// TestTranslatedRequests: however a body comes, it goes on chunked, without trailers, as its translator made it, and again if need be.
func TestTranslatedRequests(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, sent, want string }{
		{"of a length", "Content-Length: 4\r\n\r\nab-c", "aabbcc!!!!"},
		{"in chunks", "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n2\r\n-c\r\n0\r\nEnd: yes\r\n\r\n", "aabbcc!!!!End=yes"},
		{"in chunks, with nothing in them", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""},
		{"of no length", "Content-Length: 0\r\n\r\n", ""},
		{"none", "\r\n", ""},
	} {
		q := request(t, "POST / HTTP/1.1\r\nHost: a\r\n"+c.sent)
		var tap heard
		q.Body.Tap(&tap)
		q.Body.Through(&doubler{})
		if whole, err := q.Body.Buffered(); !whole || err != nil {
			t.Errorf("%s: Buffered() = %v, %v", c.name, whole, err)
		}
		for i := range 2 {
			out := &wire{}
			if err := http1.NewClientConn(out, http1.Config{}).WriteRequest(q, nil); err != nil {
				t.Fatal(err)
			}
			sent := request(t, out.out.String())
			body, err := readAll(&sent.Body)
			if string(body) != c.want || err != nil || sent.Body.Trailers().Len() > 0 {
				t.Errorf("%s, time %d: sent %q, %v, trailers %d, want %q", c.name, i, body, err, sent.Body.Trailers().Len(), c.want)
			}
			if !q.Body.Done() || string(tap) != c.want {
				t.Errorf("%s, time %d: done %v, heard %q, want %q", c.name, i, q.Body.Done(), tap, c.want)
			}
			if !q.Body.Rewind() {
				t.Fatalf("%s: cannot be read again", c.name)
			}
		}
	}
}

// TestWhatCannotBeTranslated is the client's fault, and the rest of it can still be read.
func TestWhatCannotBeTranslated(t *testing.T) {
	t.Parallel()
	q := request(t, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\naxb\r\n1\r\nc\r\n0\r\n\r\n")
	q.Body.Through(&doubler{})
	body, err := readAll(&q.Body)
	e, ok := errors.AsType[*http1.Error](err)
	if string(body) != "aa" || !ok || e.Reason != http1.BadContent || e.Status != 400 || !e.Client() || q.Body.Done() {
		t.Errorf("read %q, %v, want aa and bad content", body, err)
	}
	q.Body.Through(nil)
	if rest, err := readAll(&q.Body); string(rest) != "c" || err != nil {
		t.Errorf("the rest: %q, %v, want c", rest, err)
	}
}

// TestTranslatedResponses go on chunked, whatever length was said, and not at all where there is no body.
func TestTranslatedResponses(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ method, head, body, want string }{
		{"GET", "Content-Length: 2\r\n", "ab", "Transfer-Encoding: chunked\r\n\r\n2\r\naa\r\n2\r\nbb\r\n2\r\n!!\r\n0\r\n\r\n"},
		{"GET", "Content-Length: 0\r\n", "", "Content-Length: 0\r\n\r\n"},
		{"HEAD", "Content-Length: 2\r\n", "", "Content-Length: 2\r\n\r\n"},
	} {
		down := &wire{in: []byte(c.method + " / HTTP/1.1\r\nHost: a\r\n\r\n")}
		s := http1.NewServerConn(down, http1.Config{})
		if _, err := s.ReadRequest(); err != nil {
			t.Fatal(err)
		}
		x := s.Exchange(http1.NewClientConn(&wire{in: []byte("HTTP/1.1 200 OK\r\nDate: now\r\n" + c.head + "\r\n" + c.body)}, http1.Config{}))
		if err := x.Send(nil); err != nil {
			t.Fatal(err)
		}
		resp, err := x.Receive()
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Through(&doubler{})
		if err := x.Respond(nil); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff("HTTP/1.1 200 OK\r\nDate: now\r\n"+c.want, down.out.String()); diff != "" {
			t.Errorf("%s, %q (-want +got):\n%s", c.method, c.head, diff)
		}
	}
}
