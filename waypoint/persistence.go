package waypoint

import (
	"cmp"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/waypoint/upstream"

	"github.com/mistnet/mistnet/internal/mesh"
)

// A client that is to stay on the endpoint that answered it first (Gateway API, GEP-1619) carries the endpoint's name, in a
// cookie or a header: a number made of the workload's UID, which is the same at every waypoint, and when it was given. It says
// which of the endpoints of a backend is tried first; the backend is chosen as ever. One that is gone, or ejected, is
// forgotten, and the client given another.

// defaultSession is the name of the cookie where none is said.
const defaultSession = "mistnet-session"

// persist makes the first try go where the client's session is.
func (s *session) persist(p *mesh.SessionPersistence, now time.Time) {
	s.stays.of, s.stays.member = p, -1
	if p == nil || !s.search.Balances() {
		s.stays.of = nil
		return
	}
	var text string
	if p.Header != "" {
		text, _ = s.q.Value(p.Header)
	} else {
		text, _ = s.cookieValue(cmp.Or(p.Cookie, defaultSession))
	}
	id, given, ok := parseSession(text)
	if !ok || p.Absolute > 0 && now.Sub(given) >= p.Absolute {
		return
	}
	if m, ok := s.search.Prefer(id); ok {
		s.stays.member, s.stays.given = m, given
	}
}

// settle tells the client its endpoint, if it does not know.
func (s *session) settle(to *upstream.Pick, now time.Time) {
	p := s.stays.of
	if p == nil {
		return
	}
	id, ok := to.Known()
	if !ok {
		return
	}
	s.stays.value = ""
	if m := s.stays.member; m >= 0 && s.search.IsAt(m, to) {
		return
	}
	value := strconv.FormatUint(id, 36) + "." + strconv.FormatInt(now.Unix(), 36)
	if p.Header != "" {
		s.stays.value = value
		return
	}
	var b strings.Builder
	b.WriteString(cmp.Or(p.Cookie, defaultSession) + "=" + value + "; Path=" + cmp.Or(p.Path, "/"))
	if p.Permanent {
		b.WriteString("; Max-Age=" + strconv.FormatInt(int64(p.Absolute.Seconds()), 10))
	}
	b.WriteString("; HttpOnly; SameSite=Lax")
	s.stays.value = b.String()
}

// persistence is where a request's session is, and what is to be told of it.
type persistence struct {
	of     *mesh.SessionPersistence // nil: it has none
	member int32                    // where the client was; -1: nowhere that is there
	given  time.Time
	value  string // of the header or cookie to set; "": none
}

// parseSession reads what settle wrote.
func parseSession(text string) (id uint64, given time.Time, ok bool) {
	a, b, found := strings.Cut(text, ".")
	id, err := strconv.ParseUint(a, 36, 64)
	at, err2 := strconv.ParseInt(b, 36, 64)
	return id, time.Unix(at, 0), found && err == nil && err2 == nil
}
