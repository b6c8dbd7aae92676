package waypoint

import "strconv"

// hopsLeft is how many intermediaries may still pass the request on (RFC 9110, 7.6.2). Not ok: any number.
func (s *session) hopsLeft() (n uint64, ok bool) {
	if m := s.q.Method; m != "OPTIONS" && m != "TRACE" {
		return 0, false
	}
	v, ok := s.q.Value("max-forwards")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(v, 10, 32)
	return n, err == nil
}

// lastHop answers a request that must go no further, as its last recipient. That of TRACE would show the client what others added
// to its request.
func (s *session) lastHop() *reply {
	if n, ok := s.hopsLeft(); !ok || n > 0 {
		return nil
	}
	r := &reply{200, "", "-", "max_forwards"}
	if s.q.Method == "TRACE" {
		r.status = 501
	}
	return r
}
