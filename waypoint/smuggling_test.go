package waypoint_test

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
)

// TestNothingIsSmuggled: whatever a client writes to hide a request in another, or a path from a policy, an application gets whole
// requests that were judged, byte for byte, or nothing. What it is sent is looked at raw, and by another parser.
func TestNothingIsSmuggled(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	var mu sync.Mutex
	var sent bytes.Buffer
	at := recorder(t, &mu, &sent)
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, at)
	l.known("cart")
	l.policy("no-admin", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/admin"}, mesh.StringMatch{Kind: mesh.MatchExact, Value: "*"})
	l.guarded(cart, "shop/no-admin")
	l.becomes("guarded", "http://10.9.0.1/admin", http.StatusForbidden)
	const (
		hidden = "GET /admin HTTP/1.1\r\nHost: a\r\nX: "
		end    = "\r\n\r\n"
	)
	post := func(fields, body string) string { return "POST / HTTP/1.1\r\nHost: a\r\n" + fields + end + body }
	get := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: a" + end }
	for name, text := range map[string]string{
		"CL.TE":                               post("Content-Length: 5\r\nTransfer-Encoding: chunked", "0\r\n\r\n"+hidden),
		"TE.CL":                               post("Transfer-Encoding: chunked\r\nContent-Length: 4", "1\r\nZ\r\n0\r\n\r\n"+hidden),
		"TE.TE, one unknown":                  post("Transfer-Encoding: chunked\r\nTransfer-Encoding: cow", "0\r\n\r\n"+hidden),
		"TE twice":                            post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "0\r\n\r\n"+hidden),
		"TE, chunked not last":                post("Transfer-Encoding: chunked, identity", "0\r\n\r\n"+hidden),
		"TE with a vertical tab":              post("Transfer-Encoding: \x0bchunked", "0\r\n\r\n"+hidden),
		"TE behind a space":                   post("Transfer-Encoding : chunked", "0\r\n\r\n"+hidden),
		"TE folded":                           post("Transfer-Encoding:\r\n chunked", "0\r\n\r\n"+hidden),
		"TE behind a bare CR":                 post("X: y\rTransfer-Encoding: chunked", "0\r\n\r\n"+hidden),
		"TE behind a bare LF":                 post("X: y\nTransfer-Encoding: chunked\nContent-Length: 3", "0\r\n\r\n"+hidden),
		"TE quoted":                           post(`Transfer-Encoding: "chunked"`, "0\r\n\r\n"+hidden),
		"TE.0":                                "OPTIONS / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + "2c\r\n" + hidden + strings.Repeat("y", 0x2c-len(hidden)) + "\r\n0\r\n\r\n",
		"CL.0":                                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 33\r\n\r\n" + hidden,
		"no length at all":                    post("X: y", hidden),
		"CL twice":                            post("Content-Length: 0\r\nContent-Length: 40", hidden),
		"CL twice, the same":                  post("Content-Length: 3, 3", "abc"+hidden),
		"CL with a sign":                      post("Content-Length: +3", "abc"+hidden),
		"CL in hexadecimals":                  post("Content-Length: 0x3", "abc"+hidden),
		"CL with a space":                     post("Content-Length: 1 0", "abc"+hidden),
		"CL beyond 64 bits":                   post("Content-Length: 18446744073709551619", "abc"+hidden),
		"CL underscored":                      post("Content_Length: 40\r\nContent-Length: 0", hidden),
		"CL of another digit":                 post("Content-Length: ３", "abc"+hidden),
		"Connection: content-length":          post("Connection: content-length\r\nContent-Length: 3", "abc"+hidden),
		"Connection: transfer-encoding":       post("Connection: transfer-encoding\r\nTransfer-Encoding: chunked", "3\r\nabc\r\n0\r\n\r\n"+hidden),
		"Connection: host":                    "GET / HTTP/1.1\r\nHost: a\r\nConnection: host" + end + hidden,
		"a chunk beyond 64 bits":              post("Transfer-Encoding: chunked", "10000000000000003\r\nabc\r\n0\r\n\r\n"+hidden),
		"a chunk with a sign":                 post("Transfer-Encoding: chunked", "+3\r\nabc\r\n0\r\n\r\n"+hidden),
		"a chunk in 0x":                       post("Transfer-Encoding: chunked", "0x3\r\nabc\r\n0\r\n\r\n"+hidden),
		"a chunk's end by LF":                 post("Transfer-Encoding: chunked", "3\nabc\n0\n\n"+hidden),
		"a chunk's end by something else":     post("Transfer-Encoding: chunked", "3\r\nabcXX0\r\n\r\n"+hidden),
		"a chunk's extension with LF":         post("Transfer-Encoding: chunked", "3;a\nb\r\nabc\r\n0\r\n\r\n"+hidden),
		"a trailer of the framing":            post("Transfer-Encoding: chunked", "0\r\nContent-Length: 40\r\nTransfer-Encoding: x\r\nHost: b\r\n\r\n"+hidden),
		"a trailer without an end":            post("Transfer-Encoding: chunked", "0\r\n"+hidden),
		"Upgrade: h2c":                        "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__" + end + "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden,
		"Upgrade to a socket without a key":   "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket" + end + hidden,
		"Expect and then another":             post("Expect: 100-continue\r\nContent-Length: 3", "abc"+hidden),
		"HTTP/1.0 with TE":                    "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked" + end + "0\r\n\r\n" + hidden,
		"HTTP/0.9":                            "GET /admin\r\n",
		"a version of its own":                "GET / HTTP/1.1\x00\r\nHost: a" + end + hidden,
		"a request line with more":            "GET / HTTP/1.1 /admin HTTP/1.1\r\nHost: a" + end,
		"two hosts":                           "GET / HTTP/1.1\r\nHost: a\r\nHost: b" + end,
		"a NUL in a value":                    "GET / HTTP/1.1\r\nHost: a\r\nX: y\x00z" + end,
		"a NUL in a name":                     "GET / HTTP/1.1\r\nHost: a\r\nX\x00: y" + end,
		"a line without a colon":              "GET / HTTP/1.1\r\nHost: a\r\nGET /admin HTTP/1.1" + end,
		"a field before the first":            "GET / HTTP/1.1\r\n X: y\r\nHost: a" + end,
		"the path itself":                     get("/admin"),
		"a letter encoded":                    get("/%61dmin"),
		"a dot":                               get("/./admin"),
		"two dots":                            get("/x/../admin"),
		"two dots encoded":                    get("/x/%2e%2E/admin"),
		"a backslash":                         get(`/x\..\admin`),
		"a fragment":                          get("/x#/../admin"),
		"a fragment behind it":                get("/admin#x"),
		"a NUL behind it":                     get("/admin%00"),
		"a NUL in the path":                   get("/\x00admin"),
		"no slash":                            get("admin"),
		"a question":                          get("/admin?x"),
		"absolute":                            get("http://a/admin"),
		"absolute with a user":                get("http://u:p@a/admin"),
		"absolute without a path":             get("http://a?/admin"),
		"absolute of another scheme":          get("gopher://a/admin"),
		"an asterisk":                         "OPTIONS * HTTP/1.1\r\nHost: a" + end,
		"CONNECT":                             "CONNECT a:80 HTTP/1.1\r\nHost: a" + end + hidden,
		"a method override that is no method": "G(T /admin HTTP/1.1\r\nHost: a" + end,
		"a space for the path":                "GET  /admin HTTP/1.1\r\nHost: a" + end,
		"a tab for a space":                   "GET\t/admin\tHTTP/1.1\r\nHost: a" + end,
	} {
		mu.Lock()
		sent.Reset()
		mu.Unlock()
		statuses := l.raw("10.9.0.1:80", text)
		mu.Lock()
		got := sent.String()
		mu.Unlock()
		whole := 0
		for r := bufio.NewReader(strings.NewReader(got)); ; whole++ {
			q, err := http.ReadRequest(r)
			if err == io.EOF {
				break
			}
			if err == nil {
				_, err = io.Copy(io.Discard, q.Body)
			}
			if err != nil {
				t.Errorf("%s: the application is sent %q: %v", name, got, err)
				break
			}
			if strings.HasPrefix(q.URL.Path, "/admin") {
				t.Errorf("%s: the application is asked for %s: %q", name, q.RequestURI, got)
			}
		}
		passed := 0
		for _, s := range statuses {
			if s == http.StatusOK {
				passed++
			}
		}
		if whole != passed || whole > 1 {
			t.Errorf("%s: the application is sent %d requests, and answers %d: %q", name, whole, passed, got)
		}
	}
}

// recorder is an application that answers every request it is asked, and keeps what it is sent.
func recorder(t *testing.T, mu *sync.Mutex, sent *bytes.Buffer) netip.AddrPort {
	t.Helper()
	ln := listen(t, loopback()+":0")
	go func() { // ends with the listener
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go answerAll(conn, mu, sent)
		}
	}()
	return addrPort(ln.Addr())
}

// answerAll answers every request that it is asked, and keeps what it is sent.
func answerAll(conn net.Conn, mu *sync.Mutex, sent *bytes.Buffer) {
	defer conn.Close()
	var all bytes.Buffer
	r := bufio.NewReader(io.TeeReader(conn, &all))
	for {
		q, err := http.ReadRequest(r)
		if err == nil {
			_, err = io.Copy(io.Discard, q.Body)
		}
		mu.Lock()
		sent.Write(all.Bytes())
		all.Reset()
		mu.Unlock()
		if err != nil {
			return
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	}
}
