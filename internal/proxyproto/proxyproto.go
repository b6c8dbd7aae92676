// Package proxyproto is the PROXY protocol (haproxy.org, proxy-protocol.txt): a header in front of a connection that says between
// whom it is, for an application that the connection reaches through a proxy. With the client's identity in a field of Istio's it
// is also how a ztunnel hands connections to a waypoint that it serves.
//
// It hides the bytes. Whether a header is to be believed, the one who listens decides.
package proxyproto

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Header is what a connection begins with.
type Header struct {
	From, To netip.AddrPort // the client, and what it asked for
	Identity mesh.Identity  // of the client; zero: not said. Version 2 only
}

// The parts of a header of version 2 (proxy-protocol.txt, 2.2).
const (
	signature    = "\r\n\r\n\x00\r\nQUIT\n"
	headerBytes  = 16   // signature, version and command, family, length
	maxBytes     = 2048 // of what follows
	commandLocal = 0x20
	commandProxy = 0x21
	overTCP4     = 0x11
	overTCP6     = 0x21
	typeIdentity = 0xD0 // a field of Istio's: the client's SPIFFE URI
)

// AppendV1 appends the header in version 1. With addresses of two families, or none, it says that it does not know.
func (h Header) AppendV1(b []byte) []byte {
	from, to := mesh.Unmap(h.From), mesh.Unmap(h.To)
	if !from.IsValid() || !to.IsValid() || from.Addr().Is4() != to.Addr().Is4() {
		return append(b, "PROXY UNKNOWN\r\n"...)
	}
	family := "TCP4"
	if from.Addr().Is6() {
		family = "TCP6"
	}
	return fmt.Appendf(b, "PROXY %s %s %s %d %d\r\n", family, from.Addr().WithZone(""), to.Addr().WithZone(""), from.Port(), to.Port())
}

// AppendV2 appends the header in version 2. Addresses of two families are both written as IPv6 (RFC 4291, 2.5.5.2). Without
// an address it says that the connection is the proxy's own.
func (h Header) AppendV2(b []byte) []byte {
	b = append(b, signature...)
	from, to := mesh.Unmap(h.From), mesh.Unmap(h.To)
	if !from.IsValid() || !to.IsValid() {
		return append(b, commandLocal, 0, 0, 0)
	}
	identity := ""
	if !h.Identity.IsZero() {
		identity = h.Identity.String()
	}
	family, size := byte(overTCP6), 2*16+4
	four := from.Addr().Is4() && to.Addr().Is4()
	if four {
		family, size = overTCP4, 2*4+4
	}
	if identity != "" {
		size += 3 + len(identity)
	}
	b = append(b, commandProxy, family)
	b = binary.BigEndian.AppendUint16(b, uint16(size))
	for _, a := range []netip.Addr{from.Addr(), to.Addr()} {
		if four {
			b = append(b, a.AsSlice()...)
			continue
		}
		sixteen := a.As16()
		b = append(b, sixteen[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	if identity != "" {
		b = append(b, typeIdentity)
		b = binary.BigEndian.AppendUint16(b, uint16(len(identity)))
		b = append(b, identity...)
	}
	return b
}

// Read reads a header of version 2 and not a byte more. One that does not say between which addresses of TCP the connection is,
// or whose identity cannot be read, is an error; a field it does not know is not.
func Read(r io.Reader) (Header, error) {
	var head [headerBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Header{}, fmt.Errorf("read PROXY header: %w", err)
	}
	size := int(binary.BigEndian.Uint16(head[14:]))
	if !bytes.HasPrefix(head[:], []byte(signature)) || head[12] != commandProxy || size > maxBytes {
		return Header{}, errors.New("not a PROXY header of version 2")
	}
	rest := make([]byte, size)
	if _, err := io.ReadFull(r, rest); err != nil {
		return Header{}, fmt.Errorf("read PROXY header: %w", err)
	}
	return parse(head[13], rest)
}

// parse reads the addresses and fields of a header.
func parse(family byte, b []byte) (h Header, err error) {
	n := map[byte]int{overTCP4: 4, overTCP6: 16}[family]
	if n == 0 || len(b) < 2*n+4 {
		return Header{}, errors.New("PROXY header without two TCP addresses")
	}
	from, _ := netip.AddrFromSlice(b[:n]) // 4 or 16 bytes are an address
	to, _ := netip.AddrFromSlice(b[n : 2*n])
	b = b[2*n:]
	h.From = mesh.Unmap(netip.AddrPortFrom(from, binary.BigEndian.Uint16(b)))
	h.To = mesh.Unmap(netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:])))
	for b = b[4:]; len(b) > 0; {
		if len(b) < 3 || len(b) < 3+int(binary.BigEndian.Uint16(b[1:])) {
			return Header{}, errors.New("PROXY header with a field that does not end")
		}
		value := b[3 : 3+int(binary.BigEndian.Uint16(b[1:]))]
		if b[0] == typeIdentity {
			if h.Identity, err = mesh.ParseIdentity(string(value)); err != nil {
				return Header{}, fmt.Errorf("PROXY header: %w", err)
			}
		}
		b = b[3+len(value):]
	}
	return h, nil
}
