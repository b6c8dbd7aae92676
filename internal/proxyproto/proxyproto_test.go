package proxyproto_test

import (
	"bytes"
	"encoding/hex"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/proxyproto"
)

var web = mesh.Identity{TrustDomain: "cluster.local", Namespace: "web", ServiceAccount: "front"}

func header(from, to string, id mesh.Identity) proxyproto.Header {
	h := proxyproto.Header{Identity: id}
	h.From, _ = netip.ParseAddrPort(from) // "": none
	h.To, _ = netip.ParseAddrPort(to)
	return h
}

// TestBytes are worked out by hand from proxy-protocol.txt, 2.2: signature, version and command, family, length, addresses,
// ports, fields. Those with an identity are as Istio's ztunnel writes them.
func TestBytes(t *testing.T) {
	const signature = "0d0a0d0a000d0a515549540a "
	uri := hex.EncodeToString([]byte("spiffe://cluster.local/ns/web/sa/front")) // 38 bytes
	for _, c := range []struct {
		name string
		h    proxyproto.Header
		v1   string
		v2   string
	}{
		{"IPv4", header("10.0.0.1:4711", "10.96.0.10:80", mesh.Identity{}), "PROXY TCP4 10.0.0.1 10.96.0.10 4711 80\r\n",
			"21 11 000c 0a000001 0a60000a 1267 0050"},
		{"IPv4 and an identity", header("10.0.0.1:4711", "10.96.0.10:80", web), "PROXY TCP4 10.0.0.1 10.96.0.10 4711 80\r\n",
			"21 11 0035 0a000001 0a60000a 1267 0050 d0 0026 " + uri},
		{"IPv6", header("[fd00::1]:4711", "[fd00::2]:80", mesh.Identity{}), "PROXY TCP6 fd00::1 fd00::2 4711 80\r\n",
			"21 21 0024 fd000000000000000000000000000001 fd000000000000000000000000000002 1267 0050"},
		{"IPv6 and an identity", header("[fd00::1]:4711", "[fd00::2]:80", web), "PROXY TCP6 fd00::1 fd00::2 4711 80\r\n",
			"21 21 004d fd000000000000000000000000000001 fd000000000000000000000000000002 1267 0050 d0 0026 " + uri},
		{"IPv4 in IPv6", header("[::ffff:10.0.0.1]:4711", "10.96.0.10:80", mesh.Identity{}), "PROXY TCP4 10.0.0.1 10.96.0.10 4711 80\r\n",
			"21 11 000c 0a000001 0a60000a 1267 0050"},
		{"two families", header("[fd00::1]:4711", "10.96.0.10:80", mesh.Identity{}), "PROXY UNKNOWN\r\n",
			"21 21 0024 fd000000000000000000000000000001 00000000000000000000ffff0a60000a 1267 0050"},
		{"no client", header("", "10.96.0.10:80", web), "PROXY UNKNOWN\r\n", "20 00 0000"},
	} {
		if got := string(c.h.AppendV1([]byte("x"))); got != "x"+c.v1 {
			t.Errorf("%s: version 1 is %q, want %q", c.name, got, c.v1)
		}
		want, err := hex.DecodeString(strings.ReplaceAll(signature+c.v2, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := c.h.AppendV2([]byte("x")); !bytes.Equal(got[1:], want) {
			t.Errorf("%s: version 2 is\n% x, want\n% x", c.name, got[1:], want)
		}
	}
}

func TestReadTakesOnlyTheHeader(t *testing.T) {
	for _, h := range []proxyproto.Header{
		header("10.0.0.1:4711", "10.96.0.10:80", web), header("[fd00::1]:1", "[fd00::2]:2", mesh.Identity{}), header("[fd00::1]:1", "10.96.0.10:80", web),
	} {
		r := bytes.NewReader(append(h.AppendV2(nil), "GET /"...))
		got, err := proxyproto.Read(r)
		rest, _ := io.ReadAll(r)
		if err != nil || got != h || string(rest) != "GET /" {
			t.Errorf("Read() = %+v, %v, and leaves %q, want %+v", got, err, rest, h)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	whole := string(header("10.0.0.1:4711", "10.96.0.10:80", web).AppendV2(nil))
	const signature = "\r\n\r\n\x00\r\nQUIT\n"
	for name, text := range map[string]string{
		"nothing":                     "",
		"half of a header":            whole[:20],
		"a request":                   "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"version 1":                   "PROXY TCP4 127.0.0.1 10.9.0.1 4711 80\r\n",
		"version 3":                   signature + "\x31\x11\x00\x0c" + whole[16:28],
		"a proxy's own":               signature + "\x20\x00\x00\x00",
		"UDP":                         signature + "\x21\x12\x00\x0c" + whole[16:28],
		"no family":                   signature + "\x21\x00\x00\x0c" + whole[16:28],
		"too short for its addresses": signature + "\x21\x11\x00\x0b" + whole[16:28],
		"too long":                    signature + "\x21\x11\x08\x01" + whole[16:28] + strings.Repeat("\x04\x00\x00", 700),
		"a field that does not end":   signature + "\x21\x11\x00\x0f" + whole[16:28] + "\xd0\x00\x01",
		"half of a field's head":      signature + "\x21\x11\x00\x0e" + whole[16:28] + "\xd0\x00",
		"an identity that is none":    signature + "\x21\x11\x00\x17" + whole[16:28] + "\xd0\x00\x08http://x",
	} {
		if h, err := proxyproto.Read(strings.NewReader(text)); err == nil {
			t.Errorf("%s: Read() = %+v, want an error", name, h)
		}
	}
}

// FuzzRead: whatever is read can be written, and reads the same again.
func FuzzRead(f *testing.F) {
	for _, h := range []proxyproto.Header{
		header("10.0.0.1:4711", "10.96.0.10:80", web), header("[fd00::1]:1", "[fd00::2]:2", mesh.Identity{}), header("", "", web),
	} {
		f.Add(append(h.AppendV2(nil), "rest"...))
		f.Add(h.AppendV1(nil))
	}
	f.Add(append([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x11"), "\x7f\x00\x00\x01\x7f\x00\x00\x01\x00\x01\x00\x02\x04\x00\x02xx"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := proxyproto.Read(r)
		if err != nil {
			return
		}
		if n := len(b) - r.Len(); n < 28 || n > 16+2048 {
			t.Fatalf("%d bytes were read", n)
		}
		if !h.From.IsValid() || !h.To.IsValid() || h.From.Addr().Is4In6() || h.To.Addr().Is4In6() {
			t.Fatalf("Read() = %+v", h)
		}
		again, err := proxyproto.Read(bytes.NewReader(h.AppendV2(nil)))
		if err != nil || again != h {
			t.Fatalf("%+v is read again as %+v, %v", h, again, err)
		}
	})
}
