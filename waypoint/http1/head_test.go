package http1_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// TestWhatGoesNoFurtherIsNotFound: who asks for a field by name is told what the next hop will see.
func TestWhatGoesNoFurtherIsNotFound(t *testing.T) {
	t.Parallel()
	q := request(t, "GET / HTTP/1.1\r\nHost: a\r\nConnection: x-hop, host\r\nX-Hop: 1\r\nX-A: 1\r\nx-hop: 2\r\nX_B: 1\r\nx-a: 2\r\nCookie: c\r\nAccept: d\r\naccept: e\r\n\r\n")
	q.Withhold(func(name string) bool { return name == "X_B" || name == "Cookie" }) // the engine knows cookies: they stay
	var got []string
	for _, name := range []string{"x-hop", "x-a", "x_b", "cookie", "host", "accept"} {
		v, _ := q.Value(name)
		said := name + "=" + v
		for i := 0; ; i++ {
			line, ok := q.Line(name, i)
			if !ok {
				break
			}
			said += fmt.Sprintf(" %d:%s", i, line)
		}
		got = append(got, said)
	}
	want := []string{"x-hop=", "x-a=1,2 0:1 1:2", "x_b=", "cookie=c 0:c", "host=a 0:a", "accept=d,e 0:d 1:e"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields (-want +got):\n%s", diff)
	}
	out := &wire{}
	if err := http1.NewClientConn(out, http1.Config{}).WriteRequest(q, nil); err != nil {
		t.Fatal(err)
	}
	if sent := out.out.Bytes(); bytes.Contains(bytes.ToLower(sent), []byte("x-hop")) || bytes.Contains(sent, []byte("X_B")) {
		t.Errorf("sent %q", sent)
	}
}
