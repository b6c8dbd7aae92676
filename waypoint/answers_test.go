package waypoint_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// says is an application that answers with that text: the first request of each connection, which it ends then, or if it stays all of
// them, until it has switched protocols. What it is sent is kept.
func says(t *testing.T, text string, stays bool, sent *lockedBuffer) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	var served sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	served.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(ctx, func() { conn.Close() })()
				sayOnce(conn, text, stays, sent)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); cancel(); served.Wait() })
	return addrPort(ln.Addr())
}

func sayOnce(conn net.Conn, text string, stays bool, sent *lockedBuffer) {
	r := io.TeeReader(conn, sent)
	var b [4096]byte
	for head := []byte(nil); ; {
		n, err := r.Read(b[:])
		if err != nil {
			return
		}
		if head = append(head, b[:n]...); !bytes.Contains(head, []byte("\r\n\r\n")) {
			continue
		}
		head = head[:0]
		_, _ = io.WriteString(conn, text)
		switch {
		case !stays:
			return
		case strings.HasPrefix(text, "HTTP/1.1 101"):
			_, _ = io.Copy(io.Discard, r)
			return
		}
	}
}

// TestAnswersAreWhole: whatever an application writes, the client is given one answer that another parser understands as one, or 502.
func TestAnswersAreWhole(t *testing.T) {
	t.Parallel()
	const (
		hidden = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
		ok     = "HTTP/1.1 200 OK\r\n"
	)
	flood := strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 100)
	cases := map[string]struct {
		text   string
		status int
		body   string
	}{
		"whole":                           {ok + "Content-Length: 2\r\n\r\nok", 200, "ok"},
		"more behind it":                  {ok + "Content-Length: 2\r\n\r\nok" + hidden, 200, "ok"},
		"two lengths":                     {ok + "Content-Length: 2\r\nContent-Length: 40\r\n\r\nok" + hidden, 502, ""},
		"two lengths in one":              {ok + "Content-Length: 2, 2\r\n\r\nok", 502, ""},
		"a length and chunks":             {ok + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, 502, ""},
		"chunks twice":                    {ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 502, ""},
		"a coding that is unknown":        {ok + "Transfer-Encoding: cow\r\n\r\n" + hidden, 502, ""},
		"chunks, and more behind them":    {ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + hidden, 200, "ok"},
		"a field with LF":                 {ok + "X: y\nSet-Cookie: a=evil\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a field with CR":                 {ok + "X: y\rSet-Cookie: a=evil\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a field with NUL":                {ok + "X: y\x00z\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a field that is folded":          {ok + "X: y\r\n Content-Length: 40\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a space before a colon":          {ok + "Content-Length : 40\r\n\r\nok", 502, ""},
		"a field before the first":        {ok + " X: y\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"Connection: content-length":      {ok + "Connection: content-length\r\nContent-Length: 2\r\n\r\nok" + hidden, 200, "ok"},
		"no body that has a length":       {"HTTP/1.1 204 No Content\r\nContent-Length: 59\r\n\r\n" + hidden, 204, ""},
		"no body that has chunks":         {"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n6\r\npoison\r\n0\r\n\r\n", 204, ""},
		"what is not modified, with more": {"HTTP/1.1 304 Not Modified\r\nContent-Length: 59\r\n\r\n" + hidden, 304, ""},
		"hints, and then an answer":       {"HTTP/1.1 103 Early Hints\r\nContent-Length: 40\r\n\r\n" + ok + "Content-Length: 2\r\n\r\nok", 200, "ok"},
		"hints without end":               {flood + ok + "Content-Length: 2\r\n\r\nok", 502, ""},
		"a switch that nobody asked for":  {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + hidden, 502, ""},
		"a status of two digits":          {"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a status beyond":                 {"HTTP/1.1 1000 OK\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"a status of nobody's":            {"HTTP/1.1 999 OK\r\nContent-Length: 2\r\n\r\nok", 999, "ok"},
		"another version":                 {"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"no HTTP":                         {"SSH-2.0-OpenSSH\r\n\r\n", 502, ""},
		"a request":                       {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 502, ""},
		"a phrase with CR":                {"HTTP/1.1 200 OK\rX: y\r\nContent-Length: 2\r\n\r\nok", 502, ""},
		"nothing":                         {"", 503, ""},
		"half a head":                     {"HTTP/1.1 200 OK\r\nContent-", 503, ""},
	}
	l := newLab(t, nil)
	var names []string
	vips := make(map[string]string)
	for name, c := range cases {
		id := fmt.Sprintf("app-%d", len(names))
		vips[name] = fmt.Sprintf("10.9.1.%d", len(names)+1)
		l.service(id, vips[name], mesh.AppHTTP1, says(t, c.text, false, new(lockedBuffer)))
		names = append(names, id)
	}
	l.known(names...)
	two := l.client2()
	for name, c := range cases {
		status, body, more := l.answersOf(vips[name] + ":80")
		if c.body == "" {
			body = ""
		}
		if status != c.status || body != c.body || more != "" {
			t.Errorf("%s: the client is answered %d %q and then %q, want %d %q", name, status, body, more, c.status, c.body)
		}
		resp, err := two.Get("http://" + vips[name])
		if err != nil {
			t.Errorf("%s: the client of HTTP/2: %v", name, err)
			continue
		}
		text, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if c.body == "" {
			text, err = nil, nil // net/http takes the length of 304 for that of a body
		}
		if resp.StatusCode != c.status || string(text) != c.body || err != nil || resp.Header.Get("Set-Cookie") != "" {
			t.Errorf("%s: the client of HTTP/2 is answered %d %v %q %v, want %d %q", name, resp.StatusCode, resp.Header, text, err, c.status, c.body)
		}
	}
}

// answersOf asks once, and returns the answer and what comes behind it.
func (l *lab) answersOf(authority string) (status int, body, more string) {
	l.t.Helper()
	s, err := l.open(l.t.Context(), authority)
	if err != nil {
		l.t.Fatal(err)
	}
	defer s.Close()
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(s, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		l.t.Fatal(err)
	}
	_ = s.CloseWrite()
	r := bufio.NewReader(s)
	for {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return 0, err.Error(), ""
		}
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			return resp.StatusCode, err.Error(), ""
		}
		if resp.StatusCode >= 200 {
			rest, _ := io.ReadAll(r)
			return resp.StatusCode, string(text), string(rest)
		}
	}
}

// TestARefusedUpgradeLeavesNoTunnel: what a client says behind an upgrade is another request, unless the application has switched to the very
// protocol that was asked for.
func TestARefusedUpgradeLeavesNoTunnel(t *testing.T) {
	t.Parallel()
	const (
		upgrade = "GET /socket HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
			"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
		empty = "Content-Length: 0\r\n\r\n"
	)
	l := newLab(t, nil)
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin"})
	i := 0
	for name, c := range map[string]struct {
		answer string
		want   []int
	}{
		"400":                       {"HTTP/1.1 400 Bad Request\r\n" + empty, []int{400, 403}},
		"200":                       {"HTTP/1.1 200 OK\r\n" + empty, []int{200, 403}},
		"426":                       {"HTTP/1.1 426 Upgrade Required\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + empty, []int{426, 403}},
		"200, and Upgrade":          {"HTTP/1.1 200 OK\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + empty, []int{200, 403}},
		"101 without a protocol":    {"HTTP/1.1 101 Switching Protocols\r\n\r\n", []int{502, 403}},
		"101 to another protocol":   {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", []int{502, 403}},
		"101 to two protocols":      {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", []int{502, 403}},
		"101 without Connection":    {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", []int{502, 403}},
		"100, and then 400":         {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\n" + empty, []int{100, 400, 403}},
		"the protocol it asked for": {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", []int{101}},
	} {
		i++
		var sent lockedBuffer
		svc, vip := fmt.Sprintf("app-%d", i), fmt.Sprintf("10.9.2.%d", i)
		app := l.service(svc, vip, mesh.AppHTTP1, says(t, c.answer, true, &sent))
		l.known(svc)
		l.guarded(app, "shop/no-admin")
		l.becomes("guarded", "http://"+vip+"/admin", http.StatusForbidden)
		before := len(sent.String())
		if got := l.raw(vip+":80", upgrade+"GET /admin HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); !slices.Equal(got, c.want) {
			t.Errorf("%s: the client is answered %d, want %d", name, got, c.want)
		}
		if told := sent.String()[before:]; strings.Contains(told, "GET /admin") != (c.want[0] == 101) {
			t.Errorf("%s: the application is sent %q", name, told)
		}
	}
}
