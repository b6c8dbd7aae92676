package authz

import (
	"fmt"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// does reports whether the request is the operation.
func (c *connection) does(o *mesh.Operation) bool {
	r := c.http
	if r == nil {
		return c.unseen
	}
	if len(o.Methods) > 0 && !anyString(o.Methods, r.Method) || anyString(o.NotMethods, r.Method) ||
		len(o.Paths) > 0 && !anyString(o.Paths, r.Path) || anyString(o.NotPaths, r.Path) ||
		len(o.Hosts) > 0 && !anyHost(o.Hosts, r.Host) || anyHost(o.NotHosts, r.Host) {
		return false
	}
	for i := range o.Headers {
		if !r.carries(&o.Headers[i], c.unseen) {
			return false
		}
	}
	return true
}

// carries reports whether a header is as a condition wants it. A header that is there several times is, to an application,
// any of them or all joined: of these, deny says that the condition holds if one could be what it asks for, and else it holds
// only if none could be what it excludes.
//
// Host is the authority, whichever way that came, and matches as one. Of what HTTP/2 writes like headers (RFC 9113, 8.3) the authority
// and the method are known, and nobody should ask for more.
func (r *HTTP) carries(h *mesh.HeaderCondition, deny bool) bool {
	switch {
	case h.Name == "host", h.Name == ":authority":
		return (len(h.Values) == 0 || anyHost(h.Values, r.Host)) && !anyHost(h.NotValues, r.Host)
	case h.Name == ":method":
		return (len(h.Values) == 0 || anyString(h.Values, r.Method)) && !anyString(h.NotValues, r.Method)
	case strings.HasPrefix(h.Name, ":"):
		return deny
	case r.Header == nil:
		return len(h.Values) == 0
	}
	value, ok := r.Header.Value(h.Name)
	if !ok {
		return len(h.Values) == 0
	}
	return (len(h.Values) == 0 || anyString(h.Values, value) || deny && r.anyLine(h.Name, h.Values)) &&
		!anyString(h.NotValues, value) && (deny || !r.anyLine(h.Name, h.NotValues))
}

// anyLine reports whether one of several headers of a name matches.
func (r *HTTP) anyLine(name string, ms []mesh.StringMatch) bool {
	if len(ms) == 0 {
		return false
	}
	if _, several := r.Header.Line(name, 1); !several {
		return false
	}
	for i := 0; ; i++ {
		line, ok := r.Header.Line(name, i)
		if !ok || anyString(ms, line) {
			return ok
		}
	}
}

// anyHost matches a host as it was written, and without its port and the dot that ends a name that is complete (RFC 1034, 3.1).
func anyHost(ms []mesh.StringMatch, host string) bool {
	name := host
	if i := strings.LastIndexByte(host, ':'); i >= 0 && strings.IndexByte(host[i:], ']') < 0 {
		name = host[:i]
	}
	name = strings.TrimSuffix(name, ".")
	for i := range ms {
		if hostMatches(&ms[i], host) || len(name) < len(host) && hostMatches(&ms[i], name) {
			return true
		}
	}
	return false
}

// hostMatches is stringMatches without regard to letters' case.
func hostMatches(m *mesh.StringMatch, host string) bool {
	n := len(m.Value)
	switch m.Kind {
	case mesh.MatchExact:
		return strings.EqualFold(host, m.Value)
	case mesh.MatchPrefix:
		return len(host) >= n && strings.EqualFold(host[:n], m.Value)
	case mesh.MatchSuffix:
		return len(host) >= n && strings.EqualFold(host[len(host)-n:], m.Value)
	case mesh.MatchPresence:
		return host != ""
	case mesh.MatchNever, mesh.MatchTemplate:
	}
	return false
}

// templateMatches reports whether a path has the form of a template that mesh.CheckPathTemplate accepts. No part of it can
// match in two ways, so it goes from left to right once.
func templateMatches(template, path string) bool {
	for {
		i := strings.IndexByte(template, '{')
		if i < 0 {
			return path == template
		}
		if !strings.HasPrefix(path, template[:i]) {
			return false
		}
		template, path = template[i:], path[i:]
		if after, ok := strings.CutPrefix(template, mesh.TemplateRest); ok {
			return strings.HasSuffix(path, after)
		}
		template = template[len(mesh.TemplateSegment):]
		n := strings.IndexByte(path, '/')
		if n < 0 {
			n = len(path)
		}
		if n == 0 {
			return false
		}
		path = path[n:]
	}
}

// checkTemplates looks for templates where there is no path, and for those that are none.
func checkTemplates(m *mesh.Match) error {
	lists := [][]mesh.StringMatch{m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals}
	if o := m.Operation; o != nil {
		for _, ms := range [...][]mesh.StringMatch{o.Paths, o.NotPaths} {
			for _, sm := range ms {
				if sm.Kind != mesh.MatchTemplate {
					continue
				}
				if err := mesh.CheckPathTemplate(sm.Value); err != nil {
					return err
				}
			}
		}
		lists = append(lists, o.Hosts, o.NotHosts, o.Methods, o.NotMethods)
		for i := range o.Headers {
			lists = append(lists, o.Headers[i].Values, o.Headers[i].NotValues)
		}
	}
	for _, ms := range lists {
		for _, sm := range ms {
			if sm.Kind == mesh.MatchTemplate {
				return fmt.Errorf("path template %q stands where no path is matched", sm.Value)
			}
		}
	}
	return nil
}

// stringsOf are all lists of strings of an operation.
func stringsOf(o *mesh.Operation) [][]mesh.StringMatch {
	if o == nil {
		return nil
	}
	lists := [][]mesh.StringMatch{o.Hosts, o.NotHosts, o.Methods, o.NotMethods, o.Paths, o.NotPaths}
	for i := range o.Headers {
		lists = append(lists, o.Headers[i].Values, o.Headers[i].NotValues)
	}
	return lists
}
