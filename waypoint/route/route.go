package route

import "github.com/mistnet/mistnet/internal/mesh"

// Request is what a rule looks at.
type Request struct {
	Method    string
	Scheme    string
	Authority string // Host or :authority, as the client wrote it
	Path      string // normalised, without the query
	RawQuery  string // without the ?
	Header    Header // nil: none

	Port            uint16 // of the service
	SourceNamespace string // of the client's workload
	SourceLabels    map[string]string
	GRPC            bool
}

// Header is the headers of a request.
type Header interface {
	// Value returns the values of a header, its name in lower case, joined with ",", and whether there is any.
	Value(name string) (string, bool)
	// Next returns the first line of a header, its name in lower case, from a position on (0: the beginning), and the position
	// behind it; -1 when there is none.
	Next(name string, from int) (value string, next int)
}

// Table holds the rules of all services. It is immutable; nil knows none.
type Table struct {
	services map[place]*Routes
}

// place is a service's key and port; port 0 stands for the ports that no route names.
type place struct {
	service string
	port    uint16
}

// Lookup returns the rules for a port of a service (namespace/hostname). It is never nil: where nobody wrote a rule,
// everything goes on to the service itself.
func (t *Table) Lookup(service string, port uint16) *Routes {
	if t == nil {
		return defaultRoutes
	}
	if r := t.services[place{service, port}]; r != nil {
		return r
	}
	if r := t.services[place{service, 0}]; r != nil {
		return r
	}
	return defaultRoutes
}

// Match returns the rule that decides about a request to a port of a service, and how its path matched. A nil rule means
// that there are rules for this client on this port and none matches: answer 404. It does not allocate.
func (t *Table) Match(service string, port uint16, r *Request) (*Rule, Matched) {
	return t.Lookup(service, port).Match(r)
}

// Routes are the rules for one port of one service.
type Routes struct {
	http []entry // in total order
	find index   // of http
	tls  []streamEntry
	tcp  []streamEntry
}

// defaultRoutes are those of a service nobody wrote a rule for.
var defaultRoutes = &Routes{}

// entry is one match of one rule.
type entry struct {
	rule *Rule
	cond conditions
	at   Matched
	pos  int // the index of the match in its rule; -1 when the rule has none
}

// Matched says how a path matched: what a rewrite of the prefix replaces, and the name of the match.
type Matched struct {
	Kind   mesh.PathKind
	Prefix int    // how many bytes of the path matched as a prefix; of an exact path or regex, nothing is left
	Name   string // the match's name (VirtualService match[].name)
}

// Match is Table.Match for a service and port that were looked up.
func (s *Routes) Match(r *Request) (*Rule, Matched) {
	if len(s.http) == 0 {
		return defaultRule, Matched{Kind: mesh.PathSegment}
	}
	i := s.find.first(s.http, r)
	if i >= 0 {
		return s.http[i].rule, s.http[i].at
	}
	for i := range s.http {
		if c := &s.http[i].cond; (c.clients == "" || c.clients == r.SourceNamespace) && (c.port == 0 || c.port == r.Port) {
			return nil, Matched{}
		}
	}
	return defaultRule, Matched{Kind: mesh.PathSegment} // all rules are for clients of other namespaces, or for other ports
}
