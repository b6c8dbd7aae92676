package route

import (
	"math"
	"strconv"
	"time"
)

// Timeouts are how long the whole exchange may take and how long each try, for a request with that grpc-timeout header
// ("" when it has none or is not gRPC). 0 is no limit. What the client asks for replaces the rule's timeout, which
// bounds it. A try takes no longer than the whole.
func (r *Rule) Timeouts(grpcTimeout string) (whole, try time.Duration) {
	whole, try = r.Timeout, r.TryTimeout
	if asked, ok := ParseGRPCTimeout(grpcTimeout); ok && (whole == 0 || asked < whole) {
		whole = asked
	}
	if whole != 0 && try >= whole {
		try = 0 // the whole ends it
	}
	return whole, try
}

// AppendGRPCTimeout appends a timeout as a grpc-timeout header has it: rounded up to milliseconds, and long ones to what eight digits can
// say, so that who is told does not give up first.
func AppendGRPCTimeout(b []byte, d time.Duration) []byte {
	const most = 99_999_999
	for _, u := range [...]struct {
		of   time.Duration
		name byte
	}{{time.Millisecond, 'm'}, {time.Second, 'S'}, {time.Minute, 'M'}, {time.Hour, 'H'}} {
		n := d / u.of
		if d%u.of > 0 {
			n++
		}
		if n <= most || u.of == time.Hour {
			return append(strconv.AppendInt(b, max(int64(n), 1), 10), u.name)
		}
	}
	return b
}

// ParseGRPCTimeout reads a grpc-timeout header: up to eight digits and a unit. A timeout of zero is one nanosecond: it
// has passed already, and is not the same as none.
func ParseGRPCTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	var n int64
	for i := range len(s) - 1 {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	var unit time.Duration
	switch s[len(s)-1] {
	case 'H':
		unit = time.Hour
	case 'M':
		unit = time.Minute
	case 'S':
		unit = time.Second
	case 'm':
		unit = time.Millisecond
	case 'u':
		unit = time.Microsecond
	case 'n':
		unit = time.Nanosecond
	default:
		return 0, false
	}
	if n > math.MaxInt64/int64(unit) {
		return math.MaxInt64, true
	}
	return max(time.Duration(n)*unit, 1), true
}
