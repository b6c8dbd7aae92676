package waypoint

import (
	"encoding/binary"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// maxHello is how much of a TLS connection is looked at for the name of the server that is asked for: enough for a hello with
// keys for a hybrid key exchange, and a few records around it.
const maxHello = 8 << 10

// hello is what the beginning of a connection tells of TLS.
type hello struct {
	tls      bool   // it may be TLS
	certain  bool   // more of it would change nothing
	name     string // of the server, in lower case; "": it names none
	protocol string // that the client asks for first (ALPN); "": none
}

// readHello looks at the beginning of a connection. A hello may come in several records (RFC 8446, 5.1). One that is
// malformed or too long is one without a name: the server will say what it thinks of it.
func readHello(b []byte) hello {
	const handshake, clientHello = 22, 1
	var body []byte // of the handshake message, out of its records
	rest := b
	for {
		if len(body) > 0 && body[0] != clientHello {
			return hello{certain: true}
		}
		if len(body) >= 4 {
			if n := int(body[1])<<16 | int(body[2])<<8 | int(body[3]); len(body)-4 >= n {
				h := parseHello(body[4 : 4+n])
				h.tls, h.certain = true, true
				return h
			}
		}
		if len(rest) > 0 && rest[0] != handshake || len(rest) > 1 && rest[1] != 3 {
			return hello{tls: len(body) > 0, certain: true}
		}
		if len(rest) < 5 {
			return hello{tls: true, certain: len(b) >= maxHello}
		}
		n := int(binary.BigEndian.Uint16(rest[3:]))
		if n == 0 || n > 16<<10 {
			return hello{tls: len(body) > 0, certain: true}
		}
		part := rest[5:min(5+n, len(rest))]
		if body = append(body, part...); len(part) < n { // the record goes on, and may hold all of the message so far
			rest = nil
			continue
		}
		rest = rest[5+n:]
	}
}

// parseHello reads a ClientHello (RFC 8446, 4.1.2).
func parseHello(b []byte) (h hello) {
	r := fields{b, true}
	r.skip(2 + 32) // version, random
	r.take(1)      // session
	r.take(2)      // cipher suites
	r.take(1)      // compression
	extensions := fields{r.take(2), r.ok}
	for extensions.ok && len(extensions.b) > 0 {
		kind := extensions.number(2)
		e := fields{extensions.take(2), extensions.ok}
		switch kind {
		case 0: // server_name: a list, of which only host names are known (RFC 6066, 3)
			names := fields{e.take(2), e.ok}
			if names.number(1) == 0 {
				h.name = serverNameOf(string(names.take(2)), names.ok)
			}
		case 16: // application_layer_protocol_negotiation (RFC 7301, 3.1)
			protocols := fields{e.take(2), e.ok}
			h.protocol = string(protocols.take(1))
		}
	}
	return h
}

// serverNameOf is a name as rules compare it; "" when it is no name of a host.
func serverNameOf(name string, ok bool) string {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if !ok || !mesh.IsName(name) {
		return ""
	}
	return name
}

// fields reads numbers and vectors; when there is too little for one, it is no longer ok and yields nothing.
type fields struct {
	b  []byte
	ok bool
}

func (f *fields) skip(n int) []byte {
	if !f.ok || len(f.b) < n {
		f.ok, f.b = false, nil
		return nil
	}
	out := f.b[:n]
	f.b = f.b[n:]
	return out
}

func (f *fields) number(bytes int) (n int) {
	for _, c := range f.skip(bytes) {
		n = n<<8 | int(c)
	}
	return n
}

// take reads a vector whose length is a number of so many bytes.
func (f *fields) take(bytes int) []byte { return f.skip(f.number(bytes)) }
