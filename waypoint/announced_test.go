package waypoint_test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint"
)

// announcement is a PROXY header of version 2 as a ztunnel writes it.
func announcement(from, to string, fields ...string) []byte {
	src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	body := append(src.Addr().AsSlice(), dst.Addr().AsSlice()...)
	body = binary.BigEndian.AppendUint16(body, src.Port())
	body = binary.BigEndian.AppendUint16(body, dst.Port())
	for _, f := range fields {
		body = append(body, f[0])
		body = binary.BigEndian.AppendUint16(body, uint16(len(f)-1))
		body = append(body, f[1:]...)
	}
	family := byte(0x11)
	if src.Addr().Is6() {
		family = 0x21
	}
	head := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, family)
	return append(binary.BigEndian.AppendUint16(head, uint16(len(body))), body...)
}

// TestConnectionsThatZtunnelAnnounces: requests on a connection that begins with a PROXY header are served as those of a tunnel
// are; a connection whose header does not say who calls whom is not served at all.
func TestConnectionsThatZtunnelAnnounces(t *testing.T) {
	t.Parallel()
	at := loopback() + ":15088"
	l := newLab(t, func(c *waypoint.Config) { c.ListenAddr, c.ProxyAddr = "", at })
	l.service("cart", "10.9.0.1", mesh.AppHTTP1, named(t, "cart"))
	l.known("cart")
	const identity = "\xd0spiffe://cluster.local/ns/web/sa/front"
	for _, c := range []struct {
		name   string
		header []byte
		want   string // of the second of two responses; "": closed without one
	}{
		{"with an identity", announcement("127.0.0.1:4711", "10.9.0.1:80", identity), "cart /again"},
		{"with fields of others", announcement("127.0.0.1:4711", "10.9.0.1:80", "\x02example", identity, "\xd1x"), "cart /again"},
		{"addresses of six to a service of four", announcement("[::ffff:127.0.0.1]:4711", "[::ffff:10.9.0.1]:80", identity), "cart /again"},
		{"without an identity", announcement("127.0.0.1:4711", "10.9.0.1:80"), ""},
		{"with an identity that is none", announcement("127.0.0.1:4711", "10.9.0.1:80", "\xd0http://x"), ""},
		{"for nobody we know", announcement("127.0.0.1:4711", "10.9.0.9:80", identity), ""},
		{"with a field that does not end", append(announcement("127.0.0.1:4711", "10.9.0.1:80", identity)[:16], make([]byte, 64)...), ""},
		{"not a header", []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), ""},
		{"version 1", []byte("PROXY TCP4 127.0.0.1 10.9.0.1 4711 80\r\n"), ""},
		{"a local one", append([]byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00"), 0, 0), ""},
		{"a long one", append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11"), 0xff, 0xff), ""},
	} {
		conn, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write(c.header); err != nil {
			t.Fatal(err)
		}
		got, err := twice(conn)
		if c.want == "" && err == nil || c.want != "" && got != c.want {
			t.Errorf("%s: response is %q, %v, want %q", c.name, got, err, c.want)
		}
	}
	l.eventually("access log", func() bool { return strings.Contains(l.log.String(), `"path":"/again"`) })
	for _, want := range []string{`"src.identity":"spiffe://cluster.local/ns/web/sa/front"`, `"downstream_remote_address":"127.0.0.1:4711"`} {
		if !strings.Contains(l.log.String(), want) {
			t.Errorf("the access log does not hold %s", want)
		}
	}
}

// twice makes two requests on one connection and returns the second response.
func twice(conn net.Conn) (got string, err error) {
	r := bufio.NewReader(conn)
	for _, path := range []string{"/first", "/again"} {
		if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: cart\r\n\r\n", path); err != nil {
			return "", err
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return "", err
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return "", err
		}
		got = string(body)
	}
	return got, nil
}
