package route

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Stream is what a rule for connections looks at.
type Stream struct {
	SNI             string     // of a TLS ClientHello; "": it is not TLS, or names nobody
	Destination     netip.Addr // the address the client dialled
	Source          netip.Addr // the client's
	Port            uint16     // of the service
	SourceNamespace string
	SourceLabels    map[string]string
}

// streamEntry is one match of one rule.
type streamEntry struct {
	rule         *Rule
	sni          []string // lower case; *.x for every name below x
	destinations []netip.Prefix
	sources      []netip.Prefix
	labels       []label
	namespace    string
	clients      string
	port         uint16
	pos          int
}

// MatchStream returns the rule that decides about a connection: TLS rules come before TCP rules, and are asked when there
// is an SNI. A nil rule means that there are rules for this client on this port and none
// matches: close the connection. It does not allocate.
func (s *Routes) MatchStream(c *Stream) *Rule {
	if c.SNI != "" {
		for i := range s.tls {
			if s.tls[i].match(c) {
				return s.tls[i].rule
			}
		}
	}
	for i := range s.tcp {
		if s.tcp[i].match(c) {
			return s.tcp[i].rule
		}
	}
	if concern(s.tcp, c) || c.SNI != "" && concern(s.tls, c) {
		return nil
	}
	return defaultRule
}

// concern reports whether any match is about connections of this client's namespace to this port.
func concern(list []streamEntry, c *Stream) bool {
	for i := range list {
		if e := &list[i]; (e.clients == "" || e.clients == c.SourceNamespace) && (e.port == 0 || e.port == c.Port) {
			return true
		}
	}
	return false
}

// NeedsSNI reports whether a rule asks for the server name of TLS.
func (s *Routes) NeedsSNI() bool { return len(s.tls) > 0 }

// MatchStream is Routes.MatchStream for a port of a service.
func (t *Table) MatchStream(service string, port uint16, c *Stream) *Rule {
	return t.Lookup(service, port).MatchStream(c)
}

func (e *streamEntry) match(c *Stream) bool {
	if e.port != 0 && e.port != c.Port ||
		e.namespace != "" && e.namespace != c.SourceNamespace ||
		e.clients != "" && e.clients != c.SourceNamespace ||
		len(e.sni) > 0 && !sniMatches(e.sni, c.SNI) ||
		len(e.destinations) > 0 && !contains(e.destinations, c.Destination) ||
		len(e.sources) > 0 && !contains(e.sources, c.Source) {
		return false
	}
	for i := range e.labels {
		if v, ok := c.SourceLabels[e.labels[i].key]; !ok || v != e.labels[i].value {
			return false
		}
	}
	return true
}

func sniMatches(names []string, sni string) bool {
	for _, n := range names {
		if sniMatch(n, sni) {
			return true
		}
	}
	return false
}

// sniMatch: *.x holds for one label or more in front of .x, and * for every name.
func sniMatch(name, sni string) bool {
	suffix, wild := strings.CutPrefix(name, "*")
	if !wild {
		return len(sni) == len(name) && hasFoldedPrefix(sni, name)
	}
	return len(sni) > len(suffix) && hasFoldedPrefix(sni[len(sni)-len(suffix):], suffix)
}

func contains(ps []netip.Prefix, a netip.Addr) bool {
	a = a.Unmap()
	for _, p := range ps {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func compileStream(m mesh.StreamMatch) streamEntry {
	e := streamEntry{
		destinations: m.Destinations, sources: m.Sources, labels: compileLabels(m.SourceLabels),
		namespace: m.SourceNamespace, port: m.Port,
	}
	for _, n := range m.SNI {
		e.sni = append(e.sni, strings.ToLower(n))
	}
	return e
}

// longestSNI ranks a TLSRoute: exact names before wildcards, longer before shorter.
func (e *streamEntry) longestSNI() (exact bool, length int) {
	for _, n := range e.sni {
		w := strings.HasPrefix(n, "*")
		if !w && !exact {
			exact, length = true, 0
		}
		if !w || !exact {
			length = max(length, len(n))
		}
	}
	return exact, length
}

func validStream(m *mesh.StreamRule, protocol mesh.RouteProtocol) error {
	for i, match := range m.Matches {
		if protocol == mesh.RouteTLS && len(match.SNI) == 0 {
			return fmt.Errorf("matches[%d].sni: is empty", i)
		}
		if slices.Contains(match.SNI, "") {
			return fmt.Errorf("matches[%d].sni: holds an empty name", i)
		}
	}
	return nil
}
