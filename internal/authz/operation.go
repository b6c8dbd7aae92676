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
		if !r.carries(&o.Headers[i]) {
			return false
		}
	}
	return true
}

func (r *HTTP) carries(h *mesh.HeaderCondition) bool {
	value, ok := "", false
	if r.Header != nil {
		value, ok = r.Header.Value(h.Name)
	}
	return (len(h.Values) == 0 || ok && anyString(h.Values, value)) && !(ok && anyString(h.NotValues, value))
}

// anyHost matches a host as it was written, and without its port.
func anyHost(ms []mesh.StringMatch, host string) bool {
	name := host
	if i := strings.LastIndexByte(host, ':'); i >= 0 && strings.IndexByte(host[i:], ']') < 0 {
		name = host[:i]
	}
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
