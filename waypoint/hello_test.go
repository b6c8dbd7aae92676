package waypoint

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
)

// helloOf is what crypto/tls begins a connection with.
func helloOf(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() { defer theirs.Close(); _ = tls.Client(theirs, cfg).Handshake() }()
	var head [5]byte
	if _, err := io.ReadFull(ours, head[:]); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(ours, body); err != nil {
		t.Fatal(err)
	}
	return append(head[:], body...)
}

// records is a hello of one record, in records of n bytes.
func records(hello []byte, n int) []byte {
	var out []byte
	for body := hello[5:]; len(body) > 0; {
		k := min(n, len(body))
		out = binary.BigEndian.AppendUint16(append(out, hello[:3]...), uint16(k))
		out, body = append(out, body[:k]...), body[k:]
	}
	return out
}

func TestReadHello(t *testing.T) {
	t.Parallel()
	named := helloOf(t, &tls.Config{ServerName: "Shop.Example", NextProtos: []string{"h2", "http/1.1"}})
	nameless := helloOf(t, &tls.Config{InsecureSkipVerify: true})
	old := helloOf(t, &tls.Config{ServerName: "shop.example", MaxVersion: tls.VersionTLS12})
	shop := hello{tls: true, certain: true, name: "shop.example", protocol: "h2"}
	damaged := bytes.Replace(bytes.Clone(named), []byte("Shop"), []byte("Sh\x00p"), 1)
	for _, c := range []struct {
		name string
		head []byte
		want hello
	}{
		{"nothing yet", nil, hello{tls: true}},
		{"TLS 1.3", named, shop},
		{"TLS 1.2", old, hello{tls: true, certain: true, name: "shop.example"}},
		{"with what follows", append(bytes.Clone(named), "more"...), shop},
		{"no name", nameless, hello{tls: true, certain: true}},
		{"a record for each byte", records(named, 1), shop},
		{"a few records", records(named, 100), shop},
		{"a name that is none", damaged, hello{tls: true, certain: true, protocol: "h2"}},
		{"HTTP", []byte("GET / HTTP/1.1\r\n"), hello{certain: true}},
		{"MongoDB", []byte("\x3a\x00\x00\x00\x01\x00\x00\x00"), hello{certain: true}},
		{"SSL 2", []byte("\x80\x2e\x01\x03\x01"), hello{certain: true}},
		{"an alert", []byte("\x15\x03\x03\x00\x02\x02\x28"), hello{certain: true}},
		{"another message first", []byte("\x16\x03\x01\x00\x04\x02\x00\x00\x00"), hello{certain: true}},
		{"an empty record", []byte("\x16\x03\x01\x00\x00"), hello{certain: true}},
		{"too long", append([]byte("\x16\x03\x01\x40\x00\x01\x00\xff\xff"), make([]byte, maxHello)...), hello{tls: true, certain: true}},
	} {
		if got := readHello(c.head); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	for _, whole := range [][]byte{named, records(named, 7)} {
		for n := range whole {
			if got := readHello(whole[:n]); got.certain || !got.tls {
				t.Fatalf("the first %d of %d bytes: %+v, want that it may be TLS and more is needed", n, len(whole), got)
			}
		}
	}
}

// FuzzHello: whatever comes, what more bytes would not change they do not, and a name is one.
func FuzzHello(f *testing.F) {
	h := helloOf(f, &tls.Config{ServerName: "shop.example", NextProtos: []string{"h2"}})
	f.Add(h, uint(3))
	f.Add(records(h, 9), uint(20))
	f.Add([]byte("GET / HTTP/1.1"), uint(1))
	f.Fuzz(func(t *testing.T, b []byte, n uint) {
		whole := readHello(b)
		if whole.name != "" && (!mesh.IsName(whole.name) || strings.ToLower(whole.name) != whole.name) {
			t.Errorf("the name is %q", whole.name)
		}
		if part := readHello(b[:n%(uint(len(b))+1)]); part.certain && part.name != whole.name {
			t.Errorf("the first bytes are certain of %q, all say %q", part.name, whole.name)
		}
		if len(b) >= maxHello && !whole.certain {
			t.Error("so many bytes, and still not certain")
		}
	})
}
