package http2_test

import (
	"fmt"
	"io"
	"testing"

	xhttp2 "golang.org/x/net/http2"

	"github.com/mistnet/mistnet/waypoint/http2"
)

// TestTheSameBlockAgain means the same as long as the table does, however often it comes, and whatever was done with the head
// it meant before.
func TestTheSameBlockAgain(t *testing.T) {
	const (
		head  = "\x83\x86\x84\x01\x04cart"     // POST, http, "/", an authority
		same  = head + "\xbe"                  // and the newest entry of the table
		one   = head + "\x40\x03x-a\x01" + "1" // makes it x-a: 1
		three = head + "\x40\x03x-a\x03" + "333"
		small = "\x20\x3f\xe1\x1f" + head + "\x40\x03x-a\x05" + "55555" // from an empty table
	)
	serve := func(st *http2.ServerStream) { // answers with the length of x-a, and of the body ten times
		q, err := st.Request()
		if err != nil {
			_ = st.ReplyError(err, nil)
			return
		}
		v, _ := q.Value("x-a")
		n := len(v)
		q.Withhold(func(name string) bool { return name == "x-a" })
		for err == nil {
			var p []byte
			p, err = q.Body.Next()
			n += 10 * len(p)
		}
		if err != io.EOF {
			t.Error(err)
		}
		_ = st.Reply(200, string(make([]byte, n)), nil)
	}
	toServer(t, http2.Config{}, serve, func(_ *testing.T, w *wire, _ *http2.ServerConn) {
		stream := uint32(1)
		ask := func(block, body string, want int) {
			t.Helper()
			_ = w.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: stream, EndHeaders: true, EndStream: body == "", BlockFragment: []byte(block)})
			if body != "" {
				_ = w.WriteData(stream, true, []byte(body))
			}
			w.expect(fmt.Sprintf("HEADERS %d 200", stream), fmt.Sprintf("DATA %d %d bytes end", stream, want))
			stream += 2
		}
		for range 3 {
			ask(one, "", 1)
			for range 3 {
				ask(same, "", 1)
				ask(same, "xx", 21)
			}
			ask(three, "", 3)
			for range 3 {
				ask(same, "xx", 23)
				ask(same, "", 3)
			}
			ask(small, "", 5)
			for range 3 {
				ask(same, "", 5)
			}
			for i := range 6 { // more than are remembered
				ask(fmt.Sprintf("%s\x00\x01y\x01%d", same, i), "", 5)
			}
		}
	})
}
