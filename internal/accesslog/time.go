package accesslog

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// verb is a part of a time: a layout of package time, or what it has no layout for.
type verb struct {
	layout  string // "": what follows
	literal string
	digits  int // of the fraction of the second, without a dot
	epoch   bool
}

// defaultTime is Envoy's: of a whole time, in UTC.
const defaultTime = "%Y-%m-%dT%H:%M:%S.%3fZ"

// layouts are the verbs of strftime that can be written.
var layouts = map[byte]string{
	'Y': "2006", 'y': "06", 'm': "01", 'b': "Jan", 'B': "January", 'd': "02", 'e': "_2", 'a': "Mon", 'A': "Monday", 'j': "002",
	'H': "15", 'I': "03", 'p': "PM", 'M': "04", 'S': "05", 'z': "-0700", 'Z': "MST", 'T': "15:04:05", 'R': "15:04", 'F': "2006-01-02",
	'D': "01/02/06",
}

// parseTime reads a format of strftime, with Envoy's %s, %f and %1f to %9f.
func parseTime(s string) (verbs []verb, err error) {
	if s == "" {
		s = defaultTime
	}
	for s != "" {
		plain, rest, found := strings.Cut(s, "%")
		if i := strings.IndexFunc(plain, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }); i >= 0 {
			return nil, fmt.Errorf("%q cannot be part of a time", plain[i:])
		}
		if plain != "" {
			verbs = append(verbs, verb{literal: plain})
		}
		if !found {
			break
		}
		v, n := verb{}, 1
		switch {
		case rest == "":
			return nil, fmt.Errorf("%q ends the format of a time", "%")
		case rest[0] == '%':
			v.literal = "%"
		case rest[0] == 's':
			v.epoch = true
		case rest[0] == 'f':
			v.digits = 9
		case rest[0] >= '1' && rest[0] <= '9' && len(rest) > 1 && rest[1] == 'f':
			v.digits, n = int(rest[0]-'0'), 2
		case layouts[rest[0]] != "":
			v.layout = layouts[rest[0]]
		default:
			return nil, fmt.Errorf("%q is no part of a time that is known", "%"+rest[:1])
		}
		verbs = append(verbs, v)
		s = rest[n:]
	}
	return verbs, nil
}

// AppendTime writes a time in the form that a part of StartTime or EmitTime asks for, in UTC. It has no character that text or JSON
// would escape.
func (p *Part) AppendTime(b []byte, t time.Time) []byte {
	t = t.UTC()
	for i := range p.time {
		switch v := &p.time[i]; {
		case v.layout != "":
			b = t.AppendFormat(b, v.layout)
		case v.epoch:
			b = strconv.AppendInt(b, t.Unix(), 10)
		case v.digits > 0:
			var digits [9]byte
			for at, n := len(digits)-1, t.Nanosecond(); at >= 0; at-- {
				digits[at] = byte('0' + n%10)
				n /= 10
			}
			b = append(b, digits[:v.digits]...)
		default:
			b = append(b, v.literal...)
		}
	}
	return b
}
