package waypoint

// vouched reports whether a header of a request says what only a proxy can vouch for: who the client is, or what Envoy and its
// like tell and ask each other. Those of clients go no further and nobody is deceived by them, also not applications that take
// "_" for "-" (RFC 3875, 4.1.18). A gateway tells the application where the client outside of the mesh is.
func vouched(name string) bool {
	const envoy = "x-envoy-"
	if len(name) < len(envoy) || name[0]|0x20 != 'x' {
		return false
	}
	return reads(name, "x-forwarded-client-cert") || reads(name[:len(envoy)], envoy) && !reads(name, "x-envoy-external-address")
}

// reads reports whether a name is lower but for the case of letters and "_" for "-".
func reads(name, lower string) bool {
	if len(name) != len(lower) {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if c-'A' < 26 {
			c |= 0x20
		} else if c == '_' {
			c = '-'
		}
		if c != lower[i] {
			return false
		}
	}
	return true
}
