package waypoint

import (
	"net/url"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// hashKey is a request's key; "" when it has none, and may go anywhere.
func (s *session) hashKey(h *mesh.ConsistentHash) string {
	switch {
	case h.SourceIP:
		return s.client.Addr.Addr().String()
	case h.Header != "":
		v, _ := s.q.Value(h.Header)
		return v
	case h.QueryParam != "":
		return queryValue(s.q.RawQuery, h.QueryParam)
	case h.Cookie != nil:
		return s.hashCookie(h.Cookie)
	}
	return ""
}

// hashCookie is the cookie's value. A client that has none yet is given one, if the policy says for how long.
func (s *session) hashCookie(c *mesh.HashCookie) string {
	if value, _ := s.cookieValue(c.Name); value != "" {
		return value
	}
	if c.TTL == nil {
		return ""
	}
	value := newRequestID()
	var b strings.Builder
	b.WriteString(c.Name + "=" + value)
	if *c.TTL > 0 {
		b.WriteString("; Max-Age=" + strconv.FormatInt(int64(c.TTL.Seconds()), 10))
	}
	if c.Path != "" {
		b.WriteString("; Path=" + c.Path)
	}
	for _, a := range c.Attributes {
		b.WriteString("; " + a.Name)
		if a.Value != "" {
			b.WriteString("=" + a.Value)
		}
	}
	b.WriteString("; HttpOnly")
	s.cookie = b.String()
	return value
}

// cookieValue is the value of the request's cookie of that name.
func (s *session) cookieValue(name string) (string, bool) {
	line, _ := s.q.Value("cookie")
	for pair := range strings.SplitSeq(strings.ReplaceAll(line, ",", ";"), ";") {
		if n, value, ok := strings.Cut(strings.TrimSpace(pair), "="); ok && n == name {
			return strings.Trim(value, `"`), true
		}
	}
	return "", false
}

// queryValue is the first value of a parameter of a query.
func queryValue(query, name string) string {
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		if k, err := url.QueryUnescape(key); err != nil || k != name {
			continue
		}
		if v, err := url.QueryUnescape(value); err == nil {
			return v
		}
		return value
	}
	return ""
}
