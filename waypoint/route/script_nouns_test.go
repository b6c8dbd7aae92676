package route_test

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/meshtest"
)

var routeKinds = []mesh.RouteKind{
	mesh.KindVirtualService, mesh.KindHTTPRoute, mesh.KindGRPCRoute, mesh.KindTLSRoute, mesh.KindTCPRoute,
}

// readRoute reads a route directive. Its lines:
//
//	match [name=] [path=<exact|prefix|segment|regex>:<value>] [ignore-case] [scheme=|method=|authority=<text>] [header=|without=|query=<name>:<text>]
//	      [port=] [labels=k:v] [from=ns] [grpc] [sni=a,b] [dst=|src=<prefix>]
//	backend <ns>/<host> [port=] [weight=] [subset=] [invalid=<why>] and the keys of headers, rewrite and redirect (rewrite-…, redirect-…)
//	redirect [status=] [scheme=] [host=] [port=<n>|request] [full=|prefix=|regex=<expr>-><value>]
//	rewrite [host=] [full=|prefix=|regex=<expr>-><value>]
//	headers [set=|add=<name>:<value>,…] [remove=] [reply-set=|reply-add=] [reply-remove=]
//	direct status= [body=]
//	fault [delay=<duration>@<fraction>] [abort=<status>@<fraction>] [grpc=<status>@<fraction>]
//	cors [origins=<text>,…] [methods=] [allow=] [expose=] [max-age=] [credentials] [forward]
//	mirror <ns>/<host> [percent=<fraction>]
//	timeout [whole=] [try=]
//	retry attempts= [on=5xx,…] [codes=] [backoff=]
//
// A text is exact:v, prefix:v, suffix:v, regex:v or present.
func readRoute(d *meshtest.Directive) *mesh.Route {
	i := slices.IndexFunc(routeKinds, func(k mesh.RouteKind) bool { return k.String() == d.Word(0) })
	if i < 0 {
		d.Fatalf("no kind %s", d.Word(0))
	}
	ns, name, _ := strings.Cut(d.Word(1), "/")
	parent := "shop/cart"
	if d.Has("parent") {
		parent = d.Get("parent")
	}
	pns, host, _ := strings.Cut(parent, "/")
	r := &mesh.Route{
		Kind: routeKinds[i], Namespace: ns, Name: name, Rule: uint32(number(d, "rule", 0)), Protocol: mesh.RouteHTTP,
		Invalid: strings.ReplaceAll(d.Get("invalid"), "_", " "),
		Created: time.Unix(int64(number(d, "created", 0)), 0).UTC(),
		Parents: []mesh.RouteParent{{Namespace: pns, Hostname: host, Port: uint16(number(d, "port", 0)), Clients: d.Get("clients")}},
	}
	switch {
	case r.Kind == mesh.KindTCPRoute || d.Get("protocol") == "tcp":
		r.Protocol = mesh.RouteTCP
	case r.Kind == mesh.KindTLSRoute || d.Get("protocol") == "tls":
		r.Protocol = mesh.RouteTLS
	}
	if r.Protocol != mesh.RouteHTTP {
		r.Stream = readStreamRule(d)
		return r
	}
	r.HTTP = &mesh.HTTPRule{}
	for _, l := range d.Lines() {
		readHTTPLine(l, r.HTTP)
	}
	return r
}

func readStreamRule(d *meshtest.Directive) *mesh.StreamRule {
	s := &mesh.StreamRule{}
	for _, l := range d.Lines() {
		switch l.Command {
		case "match":
			s.Matches = append(s.Matches, mesh.StreamMatch{
				SNI: l.List("sni"), Destinations: readPrefixes(l, "dst"), Sources: readPrefixes(l, "src"),
				Port: uint16(number(l, "port", 0)), SourceLabels: labels(l), SourceNamespace: l.Get("from"),
			})
		case "backend":
			s.Backends = append(s.Backends, readBackend(l))
		default:
			l.Fatalf("not a part of a rule for connections")
		}
	}
	return s
}

func readHTTPLine(l *meshtest.Directive, h *mesh.HTTPRule) {
	switch l.Command {
	case "match":
		h.Matches = append(h.Matches, readMatch(l))
	case "backend":
		h.Backends = append(h.Backends, readBackend(l))
	case "redirect":
		h.Redirect = readRedirect(l, "")
	case "rewrite":
		h.Rewrite = &mesh.Rewrite{Path: readEdit(l, ""), Authority: l.Get("host")}
	case "headers":
		h.Headers = readHeaders(l)
	case "direct":
		h.Direct = &mesh.DirectResponse{Status: uint16(number(l, "status", 200)), Body: []byte(l.Get("body"))}
	case "fault":
		h.Fault = readFault(l)
	case "cors":
		h.CORS = readCORS(l)
	case "mirror":
		h.Mirrors = append(h.Mirrors, mesh.Mirror{Ref: readRef(l), Percent: readFraction(l, l.Get("percent"))})
	case "timeout":
		h.Timeout, h.TryTimeout = duration(l, l.Get("whole")), duration(l, l.Get("try"))
	case "retry":
		h.Retry = readRetry(l)
	default:
		l.Fatalf("not a part of a rule")
	}
}

func readMatch(l *meshtest.Directive) mesh.HTTPMatch {
	m := mesh.HTTPMatch{
		Name: l.Get("name"), Scheme: optionalText(l, "scheme"), Method: optionalText(l, "method"),
		Authority: optionalText(l, "authority"), Headers: readNamed(l, "header"), WithoutHeaders: readNamed(l, "without"),
		QueryParams: readNamed(l, "query"), Port: uint16(number(l, "port", 0)), SourceLabels: labels(l),
		SourceNamespace: l.Get("from"), GRPC: l.Has("grpc"),
	}
	if l.Has("path") {
		kind, value, _ := strings.Cut(l.Get("path"), ":")
		m.Path = mesh.PathMatch{Value: value, IgnoreCase: l.Has("ignore-case")}
		for m.Path.Kind = mesh.PathAny; m.Path.Kind.String() != kind; m.Path.Kind++ {
			if m.Path.Kind > mesh.PathRegex {
				l.Fatalf("no kind of path %s", kind)
			}
		}
	}
	return m
}

func readBackend(l *meshtest.Directive) mesh.Backend {
	b := mesh.Backend{Ref: readRef(l), Weight: uint32(number(l, "weight", 1)), Headers: readHeaders(l)}
	if e := readEdit(l, "rewrite-"); e.Kind != mesh.KeepPath || l.Has("rewrite-host") {
		b.Rewrite = &mesh.Rewrite{Path: e, Authority: l.Get("rewrite-host")}
	}
	if l.Has("redirect-status") {
		b.Redirect = readRedirect(l, "redirect-")
	}
	return b
}

func readRef(l *meshtest.Directive) mesh.BackendRef {
	ns, host, _ := strings.Cut(l.Word(0), "/")
	return mesh.BackendRef{
		Namespace: ns, Hostname: host, Port: uint16(number(l, "port", 0)), Subset: l.Get("subset"),
		Invalid: strings.ReplaceAll(l.Get("invalid"), "_", " "),
	}
}

func readRedirect(l *meshtest.Directive, prefix string) *mesh.Redirect {
	r := &mesh.Redirect{
		Status: uint16(number(l, prefix+"status", 301)), Scheme: l.Get(prefix + "scheme"), Authority: l.Get(prefix + "host"),
		Path: readEdit(l, prefix),
	}
	switch l.Get(prefix + "port") {
	case "":
	case "request":
		r.PortFrom = mesh.RedirectPortRequest
	default:
		r.PortFrom, r.Port = mesh.RedirectPortFixed, uint16(number(l, prefix+"port", 0))
	}
	return r
}

func readEdit(l *meshtest.Directive, prefix string) mesh.PathEdit {
	switch {
	case l.Has(prefix + "full"):
		return mesh.PathEdit{Kind: mesh.ReplaceFull, Value: l.Get(prefix + "full")}
	case l.Has(prefix + "prefix"):
		return mesh.PathEdit{Kind: mesh.ReplacePrefix, Value: l.Get(prefix + "prefix")}
	case l.Has(prefix + "regex"):
		expr, value, _ := strings.Cut(l.Get(prefix+"regex"), "->")
		return mesh.PathEdit{Kind: mesh.ReplaceRegex, Regex: expr, Value: value}
	}
	return mesh.PathEdit{}
}

func readHeaders(l *meshtest.Directive) mesh.HeaderEdits {
	ops := func(prefix string) (o mesh.HeaderOps) {
		o.Remove = l.List(prefix + "remove")
		for _, kv := range l.List(prefix + "set") {
			k, v, _ := cutLast(kv)
			o.Set = append(o.Set, mesh.Header{Name: k, Value: v})
		}
		for _, kv := range l.List(prefix + "add") {
			k, v, _ := cutLast(kv)
			o.Add = append(o.Add, mesh.Header{Name: k, Value: v})
		}
		return o
	}
	return mesh.HeaderEdits{Request: ops(""), Response: ops("reply-")}
}

// cutLast cuts name:value, where the name may begin with a colon.
func cutLast(kv string) (string, string, bool) {
	rest, pseudo := strings.CutPrefix(kv, ":")
	k, v, ok := strings.Cut(rest, ":")
	if pseudo {
		k = ":" + k
	}
	return k, v, ok
}

func readFault(l *meshtest.Directive) *mesh.Fault {
	f := &mesh.Fault{}
	if what, part, ok := strings.Cut(l.Get("delay"), "@"); ok {
		f.Delay = mesh.Delay{Fixed: duration(l, what), Percent: readFraction(l, part)}
	}
	if what, part, ok := strings.Cut(l.Get("abort"), "@"); ok {
		n, _ := strconv.Atoi(what)
		f.Abort = mesh.Abort{HTTPStatus: uint16(n), Percent: readFraction(l, part)}
	}
	if what, part, ok := strings.Cut(l.Get("grpc"), "@"); ok {
		n, _ := strconv.Atoi(what)
		f.Abort = mesh.Abort{GRPCStatus: uint32(n), Percent: readFraction(l, part)}
	}
	return f
}

func readCORS(l *meshtest.Directive) *mesh.CORS {
	c := &mesh.CORS{
		AllowMethods: l.List("methods"), AllowHeaders: l.List("allow"), ExposeHeaders: l.List("expose"),
		Credentials: l.Has("credentials"), ForwardUnmatched: l.Has("forward"),
	}
	if l.Has("max-age") {
		age := duration(l, l.Get("max-age"))
		c.MaxAge = &age
	}
	for _, o := range l.List("origins") {
		c.AllowOrigins = append(c.AllowOrigins, readText(l, o))
	}
	return c
}

var retryConditions = []string{
	"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx",
	"refused-stream", "retriable-status-codes", "retriable-headers", "http3-post-connect-failure", "cancelled",
	"deadline-exceeded", "internal", "resource-exhausted", "unavailable",
}

func readRetry(l *meshtest.Directive) *mesh.Retry {
	r := &mesh.Retry{Attempts: uint32(number(l, "attempts", 0)), Backoff: duration(l, l.Get("backoff"))}
	for _, on := range l.List("on") {
		i := slices.Index(retryConditions, on)
		if i < 0 {
			l.Fatalf("no condition %s", on)
		}
		r.On |= 1 << i
	}
	for _, c := range l.List("codes") {
		n, _ := strconv.Atoi(c)
		r.Codes = append(r.Codes, uint16(n))
	}
	return r
}

func readNamed(l *meshtest.Directive, key string) []mesh.NamedMatch {
	var out []mesh.NamedMatch
	for _, v := range l.List(key) {
		name, t, _ := cutLast(v)
		out = append(out, mesh.NamedMatch{Name: name, Match: readText(l, t)})
	}
	return out
}

func optionalText(l *meshtest.Directive, key string) *mesh.StringMatch {
	if !l.Has(key) {
		return nil
	}
	t := readText(l, l.Get(key))
	return &t
}

func readText(l *meshtest.Directive, s string) mesh.StringMatch {
	kind, value, _ := strings.Cut(s, ":")
	kinds := map[string]mesh.MatchKind{
		"exact": mesh.MatchExact, "prefix": mesh.MatchPrefix, "suffix": mesh.MatchSuffix, "regex": mesh.MatchRegex,
		"present": mesh.MatchPresence,
	}
	if kinds[kind] == mesh.MatchNever {
		l.Fatalf("%s is not a text", s)
	}
	return mesh.StringMatch{Kind: kinds[kind], Value: value}
}

func readFraction(l *meshtest.Directive, s string) mesh.Fraction {
	if s == "" {
		return mesh.Fraction{Numerator: 1, Denominator: 1}
	}
	n, d, _ := strings.Cut(s, "/")
	a, err := strconv.ParseUint(n, 10, 32)
	b, err2 := strconv.ParseUint(d, 10, 32)
	if err != nil || err2 != nil {
		l.Fatalf("%s is not a fraction", s)
	}
	return mesh.Fraction{Numerator: uint32(a), Denominator: uint32(b)}
}

func readPrefixes(l *meshtest.Directive, key string) []netip.Prefix {
	var out []netip.Prefix
	for _, v := range l.List(key) {
		out = append(out, netip.MustParsePrefix(v))
	}
	return out
}

func duration(l *meshtest.Directive, s string) time.Duration {
	if s == "" {
		return 0
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		l.Fatalf("%v", err)
	}
	return d
}

func labels(d *meshtest.Directive) map[string]string {
	var m map[string]string
	for _, kv := range d.List("labels") {
		k, v, _ := strings.Cut(kv, ":")
		if m == nil {
			m = make(map[string]string)
		}
		m[k] = v
	}
	return m
}

func number(d *meshtest.Directive, key string, otherwise int) int {
	if !d.Has(key) || d.Get(key) == "" {
		return otherwise
	}
	n, err := strconv.Atoi(d.Get(key))
	if err != nil {
		d.Fatalf("%s: %v", key, err)
	}
	return n
}
