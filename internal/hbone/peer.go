package hbone

import "crypto/tls"

// TLS is the state of the connection that carries s: who the peer is, as its certificate proved.
func (s *Stream) TLS() tls.ConnectionState { return s.c.tls.ConnectionState() }
