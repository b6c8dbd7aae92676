package http1_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// read is a message as some parser understands it.
type read struct {
	Line, Host string
	Fields     []string // sorted, names in canonical form; without framing
	Body       string
	Trailers   []string
	Rest       string // what is left of the stream
}

// framingFields are those whose treatment differs and does not matter.
var framingFields = []string{"Host", "Content-Length", "Transfer-Encoding", "Trailer", "Connection", "Te", "Upgrade"}

func ours(f *http1.Fields) (all []string) {
	for n, v := range f.All() {
		if n = http.CanonicalHeaderKey(n); !slices.Contains(framingFields, n) {
			all = append(all, n+": "+v)
		}
	}
	slices.Sort(all)
	return all
}

func theirs(h http.Header) (all []string) {
	for n, vs := range h {
		if slices.Contains(framingFields, n) {
			continue
		}
		for _, v := range vs {
			all = append(all, n+": "+v)
		}
	}
	slices.Sort(all)
	return all
}

// lost keeps of theirs only what ours kept: trailers that we drop, they do not.
func lost(theirs, ours []string) (kept []string) {
	for _, s := range theirs {
		if slices.Contains(ours, s) {
			kept = append(kept, s)
		}
	}
	return kept
}

// rest is what a server connection has not consumed.
func rest(s *http1.ServerConn) string {
	b, _ := io.ReadAll(s.Raw())
	return string(b)
}

// sameRequest reads one request with our parser and with net/http's. What we accept they must understand the same way,
// to the last byte of its body, so that nothing can hide between two requests. It reports whether we accepted.
func sameRequest(t *testing.T, sent []byte, step int) bool {
	t.Helper()
	s := http1.NewServerConn(&wire{in: sent, step: step}, http1.Config{})
	q, err := s.ReadRequest()
	if err != nil {
		return false
	}
	if step%2 == 1 { // looked at before it is read
		if _, err := q.Body.Buffer(step); err != nil {
			return false
		}
	}
	body, err := readAll(&q.Body)
	if err != nil {
		return false
	}
	if q.Body.Rewind() {
		if again, err := readAll(&q.Body); err != nil || !bytes.Equal(again, body) {
			t.Fatalf("%q: body %q, read again %q, %v", sent, body, again, err)
		}
	}
	if q.Body.Bytes() != int64(len(body)) || q.Size() == 0 {
		t.Fatalf("%q: %d bytes of body, counted %d", sent, len(body), q.Body.Bytes())
	}
	got := read{Line: q.Method + " " + q.Target, Host: q.Authority, Fields: ours(&q.Fields), Body: string(body), Trailers: ours(q.Body.Trailers()), Rest: rest(s)}

	r := bufio.NewReaderSize(bytes.NewReader(bytes.TrimPrefix(sent, []byte("\r\n"))), 1<<17)
	p, err := http.ReadRequest(r)
	if err != nil {
		if badTrailerKey(&q.Fields) || strings.HasPrefix(q.Target, "//") || q.Method == "CONNECT" {
			return true // they refuse more: fields announced as trailers, a host in a path
		}
		t.Fatalf("we accept %q, net/http does not: %v", sent, err)
	}
	b, err := io.ReadAll(p.Body)
	if err != nil {
		t.Fatalf("we read the body of %q, net/http does not: %v", sent, err)
	}
	left, _ := io.ReadAll(r)
	want := read{Line: p.Method + " " + p.RequestURI, Host: p.Host, Fields: theirs(p.Header), Body: string(b), Trailers: lost(theirs(p.Trailer), got.Trailers), Rest: string(left)}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%q is understood differently (-net/http +ours):\n%s", sent, diff)
	}
	return true
}

func badTrailerKey(f *http1.Fields) bool {
	v, _ := f.Value("trailer")
	for key := range strings.SplitSeq(v, ",") {
		switch http.CanonicalHeaderKey(strings.TrimSpace(key)) {
		case "Transfer-Encoding", "Trailer", "Content-Length":
			return true
		}
	}
	return false
}

// roundTrip passes a request on and reads the result: it must be the same request, and passing that on must change
// nothing any more.
func roundTrip(t *testing.T, sent []byte) {
	t.Helper()
	first, ok := pass(t, sent)
	if !ok {
		return
	}
	if !sameRequest(t, []byte(first), 0) {
		t.Fatalf("%q was passed on as %q, which is refused", sent, first)
	}
	if second, ok := pass(t, []byte(first)); !ok || second != first {
		t.Fatalf("%q, passed on as %q, becomes %q, %v", sent, first, second, ok)
	}
	was, is := request(t, string(sent)), request(t, first)
	if was.Method != is.Method || was.Authority != is.Authority || was.Path != is.Path || was.RawQuery != is.RawQuery || was.Upgrade != is.Upgrade || was.Continue != is.Continue {
		t.Fatalf("%q was passed on as %q: another request", sent, first)
	}
	a, err := readAll(&was.Body)
	if err != nil {
		t.Fatal(err)
	}
	b, err := readAll(&is.Body)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, b); diff != "" || was.Body.Len() != is.Body.Len() {
		t.Fatalf("%q was passed on as %q: another body", sent, first)
	}
	if diff := cmp.Diff(ours(was.Body.Trailers()), ours(is.Body.Trailers())); diff != "" {
		t.Fatalf("%q was passed on with other trailers (-was +is):\n%s", sent, diff)
	}
	have := ours(&was.Fields)
	for _, f := range ours(&is.Fields) {
		if !slices.Contains(have, f) {
			t.Fatalf("%q was passed on as %q, with the field %q", sent, first, f)
		}
	}
}

func pass(t *testing.T, sent []byte) (string, bool) {
	t.Helper()
	q, err := http1.NewServerConn(&wire{in: sent}, http1.Config{}).ReadRequest()
	if err != nil {
		return "", false
	}
	up := &wire{}
	if err := http1.NewClientConn(up, http1.Config{}).WriteRequest(q, nil); err != nil {
		return "", false
	}
	return up.out.String(), true
}

func TestNetHTTPUnderstandsWhatWeAccept(t *testing.T) {
	t.Parallel()
	accepted := 0
	for _, c := range stories(t, "requests.txt") {
		t.Run(c.name, func(t *testing.T) {
			if sameRequest(t, []byte(c.sent), 0) {
				accepted++
			}
			sameRequest(t, []byte(c.sent), 3)
			roundTrip(t, []byte(c.sent))
		})
	}
	if accepted < 20 {
		t.Errorf("only %d requests were accepted: the test is blind", accepted)
	}
}

func FuzzRequest(f *testing.F) {
	for _, c := range stories(f, "requests.txt") {
		f.Add([]byte(c.sent), uint8(0))
	}
	f.Fuzz(func(t *testing.T, sent []byte, step uint8) {
		if a, b := requests(sent, 0), requests(sent, int(step)+1); !slices.Equal(a, b) {
			t.Fatalf("%q at once: %q, in portions of %d: %q", sent, a, int(step)+1, b)
		}
		sameRequest(t, sent, int(step))
		roundTrip(t, sent)
	})
}

func FuzzChunks(f *testing.F) {
	for _, c := range stories(f, "chunks.txt") {
		f.Add([]byte(c.sent), uint8(0))
	}
	for _, c := range stories(f, "requests.txt") {
		if _, body, ok := strings.Cut(c.sent, "\r\n\r\n"); ok && strings.Contains(strings.ToLower(c.sent), "chunked\r\n\r\n") {
			f.Add([]byte(body), uint8(1))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte, step uint8) {
		sent := append([]byte(chunkedHead), body...)
		sameRequest(t, sent, int(step))
		roundTrip(t, sent)
	})
}

func FuzzResponse(f *testing.F) {
	for _, c := range stories(f, "responses.txt") {
		f.Add([]byte(c.sent), c.method == "HEAD", uint8(0))
	}
	f.Fuzz(func(t *testing.T, sent []byte, head bool, step uint8) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		const ask = " / HTTP/1.1\r\nHost: a\r\n\r\n"
		up := http1.NewClientConn(&wire{in: sent, step: int(step)}, http1.Config{})
		if err := up.WriteRequest(request(t, method+ask), nil); err != nil {
			t.Fatal(err)
		}
		p, err := up.ReadResponse()
		if err != nil {
			return
		}
		status := fmt.Sprint(p.Status)
		body, err := readAll(&p.Body)
		if err != nil {
			return
		}
		got := read{Line: status, Fields: ours(&p.Fields), Body: string(body), Trailers: ours(p.Body.Trailers())}
		if p.HTTP10 {
			got.Line += " old"
		}
		leading := bytes.TrimPrefix(sent, []byte("\r\n"))
		r := bufio.NewReaderSize(bytes.NewReader(leading), 1<<17)
		q, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			if badTrailerKey(&p.Fields) || p.Status < 200 {
				return
			}
			t.Fatalf("we accept %q, net/http does not: %v", sent, err)
		}
		b, err := io.ReadAll(q.Body)
		if err != nil {
			t.Fatalf("we read the body of %q, net/http does not: %v", sent, err)
		}
		want := read{Line: fmt.Sprint(q.StatusCode), Fields: theirs(q.Header), Body: string(b), Trailers: lost(theirs(q.Trailer), got.Trailers)}
		if q.ProtoMinor == 0 {
			want.Line += " old"
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("%q is understood differently (-net/http +ours):\n%s", sent, diff)
		}

		// What a client of ours gets is the same once more.
		out, _, _ := exchange(t, method+ask, string(sent), nil)
		if !strings.HasPrefix(out, "HTTP/1.1 "+status) {
			t.Fatalf("%q was passed on as %q", sent, out)
		}
		if p.Status < 200 {
			return
		}
		again, err := http.ReadResponse(bufio.NewReader(strings.NewReader(out)), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("%q was passed on as %q, which net/http refuses: %v", sent, out, err)
		}
		if b, err := io.ReadAll(again.Body); err != nil || string(b) != got.Body {
			t.Fatalf("%q was passed on as %q with body %q, %v, want %q", sent, out, b, err, got.Body)
		}
	})
}
