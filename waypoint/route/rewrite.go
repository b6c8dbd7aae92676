package route

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// rewrite is a compiled mesh.PathEdit.
type rewrite struct {
	kind     mesh.PathEditKind
	value    string // a template of regexp.Expand for mesh.ReplaceRegex
	re       *regexp.Regexp
	segments bool // Gateway API: whole segments are replaced
}

// Rewrite returns the path and authority with which a request goes to backend, and at is how it matched. They are r's
// own when nothing changes them. Only another path costs an allocation.
//
// The strongest word on the authority is a rewrite of the backend, then one of the rule, then a host header set by the
// rule, then one set by the backend.
func (r *Rule) Rewrite(b *Backend, at Matched, req *Request) (path, authority string) {
	path, authority = req.Path, req.Authority
	edit := r.rewrite
	if b != nil && b.rewrite != nil {
		edit = b.rewrite
	}
	if edit != nil {
		path = edit.apply(path, at)
	}
	switch {
	case b != nil && b.strong:
		authority = b.authority
	case r.authority != "":
		authority = r.authority
	case b != nil && b.authority != "":
		authority = b.authority
	}
	return path, authority
}

func (w *rewrite) apply(path string, at Matched) string {
	switch w.kind {
	case mesh.ReplaceFull:
		return w.value
	case mesh.ReplacePrefix:
		if at.Kind != mesh.PathPrefix && at.Kind != mesh.PathSegment || at.Prefix > len(path) {
			return w.value
		}
		rest := path[at.Prefix:]
		if !w.segments {
			return w.value + rest
		}
		if out := strings.TrimSuffix(w.value, "/") + rest; out != "" {
			return out
		}
		return "/"
	case mesh.ReplaceRegex:
		return w.re.ReplaceAllString(path, w.value)
	case mesh.KeepPath:
	}
	return path
}

// compilePathEdit returns nil for an edit that keeps the path.
func compilePathEdit(e mesh.PathEdit, kind mesh.RouteKind) (*rewrite, error) {
	w := &rewrite{kind: e.Kind, value: e.Value, segments: kind != mesh.KindVirtualService}
	switch e.Kind {
	case mesh.KeepPath:
		return nil, nil
	case mesh.ReplaceFull:
		if w.value == "" {
			w.value = "/"
		}
	case mesh.ReplacePrefix:
	case mesh.ReplaceRegex:
		if err := mesh.CheckRegex(e.Regex); err != nil {
			return nil, fmt.Errorf("regex: %w", err)
		}
		re, err := regexp.Compile(e.Regex)
		if err != nil {
			return nil, fmt.Errorf("regex: %w", err)
		}
		w.re = re
		if w.value, err = template(e.Value, re.NumSubexp()); err != nil {
			return nil, fmt.Errorf("value: %w", err)
		}
	default:
		return nil, fmt.Errorf("kind: unknown value %d", e.Kind)
	}
	return w, nil
}

// template turns a RE2 replacement (\1) into one of package regexp (${1}).
func template(s string, groups int) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '$':
			b.WriteString("$$")
		case '\\':
			i++
			if i == len(s) {
				return "", errors.New(`ends in a \`)
			}
			switch d := s[i]; {
			case d == '\\':
				b.WriteByte(d)
			case '0' <= d && d <= '9':
				if int(d-'0') > groups {
					return "", fmt.Errorf(`\%c: the expression has %d groups`, d, groups)
				}
				b.WriteString("${" + string(d) + "}")
			default:
				return "", fmt.Errorf(`\%c: only \0 to \9 and \\ mean something`, d)
			}
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), nil
}

// Redirect answers with a Location.
type Redirect struct {
	Status uint16

	kind      mesh.RouteKind
	scheme    string
	authority string
	portFrom  mesh.RedirectPort
	port      uint16
	path      *rewrite
}

func compileRedirect(m *mesh.Redirect, kind mesh.RouteKind) (*Redirect, error) {
	if m == nil {
		return nil, nil
	}
	r := &Redirect{
		kind: kind, Status: m.Status, scheme: strings.ToLower(m.Scheme), authority: m.Authority, portFrom: m.PortFrom, port: m.Port,
	}
	switch m.Status {
	case 301, 302, 303, 307, 308:
	default:
		return nil, fmt.Errorf("status: %d is not 301, 302, 303, 307 or 308", m.Status)
	}
	var err error
	if r.path, err = compilePathEdit(m.Path, kind); err != nil {
		return nil, fmt.Errorf("path: %w", err)
	}
	if m.PortFrom > mesh.RedirectPortFixed {
		return nil, fmt.Errorf("port_from: unknown value %d", m.PortFrom)
	}
	return r, nil
}

// Location is where the redirect leads: an absolute URI. at is how the request matched.
func (d *Redirect) Location(at Matched, req *Request) string {
	scheme := d.scheme
	if scheme == "" {
		scheme = strings.ToLower(req.Scheme)
	}
	if scheme == "" {
		scheme = "http"
	}
	host, port := splitPort(req.Authority)
	if d.authority != "" {
		host, port = splitPort(d.authority)
	}
	switch d.portFrom {
	case mesh.RedirectPortFixed:
		port = strconv.Itoa(int(d.port))
	case mesh.RedirectPortRequest:
		port = strconv.Itoa(int(req.Port))
	case mesh.RedirectPortDefault:
		switch {
		case d.authority != "" || d.scheme == "":
		case d.kind != mesh.KindVirtualService:
			port = ""
		case req.Scheme != d.scheme && port == schemePort(req.Scheme): // any other port stays, as with Envoy
			port = ""
		}
	}
	if scheme == "http" && port == "80" || scheme == "https" && port == "443" {
		port = ""
	}
	path := req.Path
	if d.path != nil {
		path = d.path.apply(path, at)
	}
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	loc := scheme + "://" + host
	if port != "" {
		loc += ":" + port
	}
	loc += path
	if req.RawQuery != "" && !strings.Contains(path, "?") {
		loc += "?" + req.RawQuery
	}
	return loc
}

// schemePort is the port that an authority need not name.
func schemePort(scheme string) string {
	if strings.EqualFold(scheme, "https") {
		return "443"
	}
	return "80"
}

// splitPort splits an authority into host (an IPv6 address keeps its brackets) and port, "" when it has none.
func splitPort(authority string) (host, port string) {
	i := strings.LastIndexByte(authority, ':')
	if i < 0 || strings.IndexByte(authority[i:], ']') >= 0 {
		return authority, ""
	}
	if a, err := netip.ParseAddr(authority); err == nil && a.Is6() { // without brackets
		return "[" + authority + "]", ""
	}
	return authority[:i], authority[i+1:]
}
