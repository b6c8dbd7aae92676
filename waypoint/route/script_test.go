package route_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
	"github.com/mistnet/mistnet/waypoint/route"
)

// TestScripts runs the stories in testdata. They are about the service shop/cart unless they say otherwise:
//
//	route <kind> <namespace>/<name> [parent=ns/host] [port=] [clients=ns] [created=<second>] [rule=] [protocol=] [invalid=<why>]
//	  … the lines of script_nouns_test.go …
//	---- prints the problems of this rule, "ok" when it has none
//
//	request <method> <url> [query=] [service=] [port=] [from=ns] [labels=k:v,…] [grpc] [random=<0 to 1>]
//	  name: value
//	---- prints everything the rule asks for
//
//	share <n> <method> <url>      how many of n requests go to each backend
//	retry [status=] [reset=] [sent] [grpc=] [ratelimited] [header]     of the rule that matched last
//	backoff <n>                   the longest wait before each of n retries of that rule
//	timeout [grpc-timeout=]       of that rule
//	stream [sni=] [dst=] [src=] [port=] [from=] [labels=]
//	problems                      all of them
//	list                          every service's rules in their order
func TestScripts(t *testing.T) {
	meshtest.RunScripts(t, "testdata/*.txt", func(*testing.T) func(*meshtest.Directive) string {
		s := &story{last: new(route.Rule)}
		return s.run
	})
}

type story struct {
	routes []*mesh.Route
	table  *route.Table
	faults []route.Problem
	last   *route.Rule
}

func (s *story) run(d *meshtest.Directive) string {
	switch d.Command {
	case "route":
		r := readRoute(d)
		s.routes = append(s.routes, r)
		s.table, s.faults = route.Compile(s.routes)
		var own []string
		for _, p := range s.faults {
			if p.Route == r.Key() {
				own = append(own, p.String())
			}
		}
		if len(own) == 0 {
			return "ok"
		}
		return strings.Join(own, "\n")
	case "request":
		return s.request(d)
	case "share":
		return s.share(d)
	case "retry":
		o := route.Outcome{
			Sent: d.Has("sent"), Status: uint16(number(d, "status", 0)), GRPC: d.Has("grpc"),
			GRPCStatus: uint32(number(d, "grpc", 0)), Ratelimited: d.Has("ratelimited"), Header: d.Has("header"),
		}
		if d.Has("reset") {
			for o.Reset = route.ResetNone; o.Reset.String() != strings.ReplaceAll(d.Get("reset"), "-", " "); o.Reset++ {
				if o.Reset > route.ResetHTTP3 {
					d.Fatalf("no reset %s", d.Get("reset"))
				}
			}
		}
		if s.last.Retry.Retriable(o) {
			return "try again"
		}
		return "give up"
	case "backoff":
		n, _ := strconv.Atoi(d.Word(0))
		var out []string
		for i := range n {
			out = append(out, s.last.Retry.Backoff(uint32(i+1), 1<<32-1).Round(time.Millisecond).String())
		}
		return strings.Join(out, " ")
	case "timeout":
		whole, try := s.last.Timeouts(d.Get("grpc-timeout"))
		return fmt.Sprintf("whole %v, each try %v", whole, try)
	case "stream":
		return s.stream(d)
	case "list":
		var out []string
		for _, l := range s.table.List() {
			out = append(out, fmt.Sprintf("%s:%d", l.Service, l.Port))
			out = append(out, slices.Concat(l.HTTP, l.TLS, l.TCP)...)
		}
		return strings.Join(out, "\n")
	case "problems":
		var out []string
		for _, p := range s.faults {
			out = append(out, p.String())
		}
		return strings.Join(out, "\n")
	}
	d.Fatalf("no such directive")
	return ""
}

// service is which service and port a directive is about.
func service(d *meshtest.Directive) (string, uint16) {
	name := "shop/cart"
	if d.Has("service") {
		name = d.Get("service")
	}
	return name, uint16(number(d, "port", 80))
}

// readRequest reads <method> <url> and the headers below.
func readRequest(d *meshtest.Directive, first int) *route.Request {
	scheme, rest, ok := strings.Cut(d.Word(first+1), "://")
	if !ok {
		d.Fatalf("%s is not <scheme>://<authority><path>", d.Word(first+1))
	}
	authority, path, _ := strings.Cut(rest, "/")
	_, port := service(d)
	r := &route.Request{
		Method: d.Word(first), Scheme: scheme, Authority: authority, Path: "/" + path, RawQuery: d.Get("query"), Port: port,
		SourceNamespace: d.Get("from"), SourceLabels: labels(d), GRPC: d.Has("grpc"),
	}
	h := headers{}
	for line := range strings.Lines(d.Input) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if value = strings.TrimSpace(value); h[name] != "" {
			value = h[name] + "\n" + value
		}
		h[name] = value
	}
	r.Header = h
	return r
}

func random(d *meshtest.Directive) uint32 {
	if !d.Has("random") {
		return 0
	}
	f, err := strconv.ParseFloat(d.Get("random"), 64)
	if err != nil || f < 0 || f >= 1 {
		d.Fatalf("random=%s is not 0 to 1", d.Get("random"))
	}
	return uint32(f * (1 << 32))
}

func (s *story) request(d *meshtest.Directive) string {
	key, port := service(d)
	r := readRequest(d, 0)
	n := random(d)
	rule, at := s.table.Match(key, port, r)
	if rule == nil {
		return "404: no rule matches"
	}
	s.last = rule
	out := []string{"rule " + rule.Name()}
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if at.Name != "" {
		say("match %s", at.Name)
	}
	if rule.Refuse != 0 {
		say("%d: %s", rule.Refuse, rule.Why)
		return strings.Join(out, "\n")
	}
	if f := rule.Fault(n, n, r.GRPC); f != (route.Fault{}) {
		if f.Delay != 0 {
			say("wait %v", f.Delay)
		}
		if f.GRPC {
			say("fail with gRPC status %d", f.GRPCStatus)
		} else if f.Abort {
			say("fail with %d", f.HTTPStatus)
		}
		if f.Abort {
			return strings.Join(out, "\n")
		}
	}
	if c := rule.CORS.Decide(r); c != (route.CORSDecision{}) {
		verb := "grant"
		if c.Answer {
			verb = "answer"
		}
		say("%s origin=%s methods=%s headers=%s expose=%s max-age=%s credentials=%v", verb,
			c.AllowOrigin, c.AllowMethods, c.AllowHeaders, c.ExposeHeaders, c.MaxAge, c.AllowCredentials)
		if c.Answer {
			return strings.Join(out, "\n")
		}
	}
	if rule.Redirect != nil {
		say("%d to %s", rule.Redirect.Status, rule.Redirect.Location(at, r))
		return strings.Join(out, "\n")
	}
	if rule.Direct != nil {
		say("%d with %q", rule.Direct.Status, rule.Direct.Body)
		return strings.Join(out, "\n")
	}
	b, status := rule.Backend(n)
	switch {
	case b == nil:
		say("%d: no backend", status)
		return strings.Join(out, "\n")
	case status != 0:
		say("%d: %s", status, b.Ref.Invalid)
		return strings.Join(out, "\n")
	case b.Redirect != nil:
		say("%d to %s", b.Redirect.Status, b.Redirect.Location(at, r))
		return strings.Join(out, "\n")
	}
	say("to %s", sayRef(b.Ref))
	path, authority := rule.Rewrite(b, at, r)
	if path != r.Path {
		say("path %s", path)
	}
	if authority != r.Authority {
		say("authority %s", authority)
	}
	out = append(out, edited(">", r.Header.(headers), &b.Request, &rule.Request)...)
	out = append(out, edited("<", headers{"server": "app"}, &b.Response, &rule.Response)...)
	for _, m := range slices.Concat(b.Mirrors, rule.Mirrors) {
		if m.Hit(n) {
			say("copy to %s", sayRef(m.Ref))
		}
	}
	return strings.Join(out, "\n")
}

func sayRef(b mesh.BackendRef) string {
	if b.Hostname == "" {
		return "the service itself"
	}
	s := b.Service()
	if b.Port != 0 {
		s += fmt.Sprintf(":%d", b.Port)
	}
	if b.Subset != "" {
		s += " subset " + b.Subset
	}
	return s
}

// Del, Set and Add make headers editable; several values are joined as the rules see them.
func (h headers) Del(name string)        { delete(h, name) }
func (h headers) Set(name, value string) { h[name] = value }
func (h headers) Add(name, value string) {
	if old, ok := h[name]; ok {
		value = old + "," + value
	}
	h[name] = value
}

// edited lists the headers after the operations, if there are any.
func edited(mark string, h headers, ops ...*route.HeaderOps) (out []string) {
	none := true
	for _, o := range ops {
		none = none && o.IsZero()
		o.Apply(h)
	}
	if none {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(h)) {
		out = append(out, mark+" "+name+": "+h[name])
	}
	return out
}

// share draws evenly from all random numbers.
func (s *story) share(d *meshtest.Directive) string {
	n, err := strconv.ParseUint(d.Word(0), 10, 32)
	if err != nil {
		d.Fatalf("%v", err)
	}
	key, port := service(d)
	rule, _ := s.table.Match(key, port, readRequest(d, 1))
	count := make(map[string]int)
	for i := range n {
		b, status := rule.Backend(uint32((2*i + 1) << 31 / n)) // the middle of each part
		if status != 0 {
			count[fmt.Sprint(status)]++
			continue
		}
		count[sayRef(b.Ref)]++
	}
	var out []string
	for _, to := range slices.Sorted(maps.Keys(count)) {
		out = append(out, fmt.Sprintf("%s: %d", to, count[to]))
	}
	return strings.Join(out, "\n")
}

func (s *story) stream(d *meshtest.Directive) string {
	key, port := service(d)
	c := &route.Stream{SNI: d.Get("sni"), Port: port, SourceNamespace: d.Get("from"), SourceLabels: labels(d)}
	if d.Has("dst") {
		c.Destination = netip.MustParseAddr(d.Get("dst"))
	}
	if d.Has("src") {
		c.Source = netip.MustParseAddr(d.Get("src"))
	}
	rule := s.table.MatchStream(key, port, c)
	if rule == nil {
		return "close: no rule matches"
	}
	if rule.Refuse != 0 {
		return "rule " + rule.Name() + "\nclose: " + rule.Why
	}
	b, status := rule.Backend(random(d))
	if status != 0 {
		return fmt.Sprintf("rule %s\nclose: no backend", rule.Name())
	}
	return "rule " + rule.Name() + "\nto " + sayRef(b.Ref)
}
