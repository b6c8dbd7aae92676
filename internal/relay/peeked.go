package relay

import "net"

// Peeked is a connection of which the first bytes were read, and are to be read again.
type Peeked struct {
	Conn
	Head []byte // what is left of them
}

// Read implements net.Conn.
func (p *Peeked) Read(b []byte) (int, error) {
	if len(p.Head) == 0 {
		return p.Conn.Read(b)
	}
	n := copy(b, p.Head)
	p.Head = p.Head[n:]
	return n, nil
}

// WritesTo returns the connection that what is written goes to as it is.
func (p *Peeked) WritesTo() net.Conn { return p.Conn }

// Reset ends the connection with an error that the peer sees.
func (p *Peeked) Reset() error {
	if r, ok := p.Conn.(interface{ Reset() error }); ok {
		return r.Reset()
	}
	return p.Close()
}
