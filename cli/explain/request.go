package explain

import (
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/waypoint/route"
)

// Question is a request that somebody might send, or a connection somebody might open.
type Question struct {
	Method  string            // of HTTP; "GRPC" for a gRPC request, "TCP" and "TLS" for connections
	URL     string            // http://host[:port]/path; the scheme may be left out
	Headers map[string]string // names in whatever case
	From    string            // the client's namespace; "": the service's own
	Labels  map[string]string // the client's
	SNI     string            // of TLS
}

// Explain says what the waypoint in front of the service does with it: the rule that decides, and in words what follows.
func (m *Mesh) Explain(q Question) (rule, what string, err error) {
	raw := q.URL
	if !strings.Contains(raw, "://") {
		raw = "http://" + raw
	}
	u, err := url.Parse(raw)
	if err != nil {
		return "", "", err
	}
	svc, err := m.service(u.Hostname(), q.From)
	if err != nil {
		return "", "", err
	}
	port, err := portOf(svc, u.Port())
	if err != nil {
		return "", "", err
	}
	if q.From == "" {
		q.From = svc.Namespace
	}
	t := &teller{svc: svc, port: port, domain: m.cfg.ClusterDomain}
	if q.Method == "TCP" || q.Method == "TLS" {
		r := m.table.MatchStream(svc.Key(), port, &route.Stream{
			SNI: q.SNI, Port: port, Destination: vip(svc), SourceNamespace: q.From, SourceLabels: q.Labels,
		})
		return t.stream(r)
	}
	h := make(headers, len(q.Headers))
	for name, value := range q.Headers {
		h[strings.ToLower(name)] = value
	}
	r := &route.Request{
		Method: q.Method, Scheme: u.Scheme, Authority: u.Host, Path: u.EscapedPath(), RawQuery: u.RawQuery, Header: h,
		Port: port, SourceNamespace: q.From, SourceLabels: q.Labels, GRPC: q.Method == "GRPC",
	}
	if r.GRPC {
		r.Method = http.MethodPost
		h["content-type"] = "application/grpc"
	}
	if r.Path == "" {
		r.Path = "/"
	}
	found, at := m.table.Match(svc.Key(), port, r)
	return t.request(found, at, r)
}

// portOf is the port that was asked for, or the service's only one, or 80.
func portOf(svc *mesh.Service, text string) (uint16, error) {
	if text == "" && len(svc.Ports) == 1 {
		return svc.Ports[0].ServicePort, nil
	}
	if text == "" {
		text = "80"
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %q: %w", text, err)
	}
	if _, ok := svc.Port(uint16(n)); !ok {
		return 0, fmt.Errorf("service %s has no port %s", svc.Key(), text)
	}
	return uint16(n), nil
}

func vip(svc *mesh.Service) netip.Addr {
	if len(svc.VIPs) == 0 {
		return netip.Addr{}
	}
	return svc.VIPs[0].Prefix.Addr()
}

type headers map[string]string

// Value implements route.Header.
func (h headers) Value(name string) (string, bool) {
	v, ok := h[name]
	return v, ok
}

// Next implements route.Header: a question has each header once.
func (h headers) Next(name string, from int) (string, int) {
	if v, ok := h[name]; ok && from == 0 {
		return v, 1
	}
	return "", -1
}

// teller puts a decision into words.
type teller struct {
	svc    *mesh.Service
	port   uint16
	domain string
	parts  []string
}

func (t *teller) say(format string, args ...any) {
	t.parts = append(t.parts, fmt.Sprintf(format, args...))
}

func (t *teller) text() string { return strings.Join(t.parts, "; ") }

func (t *teller) request(r *route.Rule, at route.Matched, q *route.Request) (rule, what string, err error) {
	if r == nil {
		return "", "answer 404: no rule matches", nil
	}
	switch {
	case r.Refuse != 0:
		t.say("answer %d: the rule is not valid: %s", r.Refuse, r.Why)
		return r.Name(), t.text(), nil
	case r.Redirect != nil:
		t.say("redirect %d to %s", r.Redirect.Status, r.Redirect.Location(at, q))
	case r.Direct != nil:
		t.say("answer %d %q", r.Direct.Status, r.Direct.Body)
	default:
		t.forward(r, at, q)
	}
	t.faults(r)
	d := r.CORS.Decide(q)
	switch {
	case d.Answer && d.AllowOrigin != "":
		t.parts = []string{"answer preflight for " + d.AllowOrigin}
	case d.Answer:
		t.parts = []string{"answer preflight without any grant"}
	case d.AllowOrigin != "":
		t.say("allow origin %s", d.AllowOrigin)
	}
	return r.Name(), t.text(), nil
}

func (t *teller) forward(r *route.Rule, at route.Matched, q *route.Request) {
	backends := r.Backends()
	var first *route.Backend
	if len(backends) > 0 {
		first = &backends[0]
	}
	path, authority := r.Rewrite(first, at, q)
	as := ""
	if authority != q.Authority {
		as = "for " + authority + " "
	}
	if path != q.Path {
		as += "as " + path + " "
	}
	t.say("%s", as+t.destinations(r))
	if r.Timeout > 0 {
		t.say("within %v", r.Timeout)
	}
	if r.TryTimeout > 0 {
		t.say("each try within %v", r.TryTimeout)
	}
	if r.Route != nil && r.Route.HTTP != nil && r.Route.HTTP.Retry != nil {
		t.say("%d retries", r.Retry.Attempts)
	}
	for _, mirror := range r.Mirrors {
		t.say("copy to %s%s", t.ref(&mirror.Ref), part(mirror.Percent))
	}
	t.edits("request", &r.Request)
	t.edits("response", &r.Response)
}

func (t *teller) destinations(r *route.Rule) string {
	var total uint64
	backends := slices.DeleteFunc(slices.Clone(r.Backends()), func(b route.Backend) bool { return b.Weight == 0 })
	for i := range backends {
		total += uint64(backends[i].Weight)
	}
	if total == 0 {
		_, status := r.Backend(0)
		return fmt.Sprintf("answer %d: the rule has no destination", status)
	}
	out := make([]string, len(backends))
	for i := range backends {
		b := &backends[i]
		out[i] = t.ref(&b.Ref)
		if b.Refuse != 0 {
			out[i] = fmt.Sprintf("nowhere, answer %d: %s", b.Refuse, b.Ref.Invalid)
		}
		if len(backends) > 1 {
			out[i] += fmt.Sprintf(" (%d of %d)", b.Weight, total)
		}
	}
	return "to " + strings.Join(out, ", ")
}

// ref names a destination as its owner would.
func (t *teller) ref(ref *mesh.BackendRef) string {
	host, port := ref.Hostname, ref.Port
	if host == "" {
		host = t.svc.Hostname
	}
	if port == 0 {
		port = t.port
	}
	host = strings.TrimSuffix(strings.TrimSuffix(host, ".svc."+t.domain), "."+t.svc.Namespace)
	out := host + ":" + strconv.Itoa(int(port))
	if ref.Subset != "" {
		out += " subset " + ref.Subset
	}
	return out
}

func (t *teller) edits(of string, ops *route.HeaderOps) {
	for _, name := range ops.Remove {
		t.say("%s remove %s", of, name)
	}
	for _, h := range ops.Set {
		t.say("%s set %s: %s", of, h.Name, h.Value)
	}
	for _, h := range ops.Add {
		t.say("%s add %s: %s", of, h.Name, h.Value)
	}
}

func (t *teller) faults(r *route.Rule) {
	if r.Route == nil || r.Route.HTTP == nil || r.Route.HTTP.Fault == nil {
		return
	}
	f := r.Route.HTTP.Fault
	if f.Delay.Percent.Numerator > 0 {
		t.say("delay %v%s", f.Delay.Fixed, part(f.Delay.Percent))
	}
	if f.Abort.Percent.Numerator > 0 && f.Abort.HTTPStatus != 0 {
		t.say("abort %d%s", f.Abort.HTTPStatus, part(f.Abort.Percent))
	} else if f.Abort.Percent.Numerator > 0 {
		t.say("abort with gRPC status %d%s", f.Abort.GRPCStatus, part(f.Abort.Percent))
	}
}

// part says of how many requests something is true, when not of all.
func part(f mesh.Fraction) string {
	a, b := uint64(f.Numerator), uint64(f.Denominator)
	for b != 0 {
		a, b = b, a%b
	}
	if a == 0 || f.Numerator == f.Denominator {
		return ""
	}
	return fmt.Sprintf(" (%d of %d)", uint64(f.Numerator)/a, uint64(f.Denominator)/a)
}

func (t *teller) stream(r *route.Rule) (rule, what string, err error) {
	switch {
	case r == nil:
		return "", "close: no rule matches", nil
	case r.Refuse != 0:
		return r.Name(), "close: the rule is not valid: " + r.Why, nil
	}
	return r.Name(), t.destinations(r), nil
}
