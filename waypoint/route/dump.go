package route

import (
	"cmp"
	"slices"
)

// Listed is the order of one port of one service, for dumps.
type Listed struct {
	Service string
	Port    uint16 // 0: the ports that no route names
	HTTP    []string
	TLS     []string
	TCP     []string // keys of rules, each as often as it has matches, the first first
}

// List is the whole table, sorted by service and port.
func (t *Table) List() []Listed {
	if t == nil {
		return nil
	}
	out := make([]Listed, 0, len(t.services))
	for at, s := range t.services {
		l := Listed{Service: at.service, Port: at.port}
		for i := range s.http {
			l.HTTP = append(l.HTTP, s.http[i].rule.Name())
		}
		for i := range s.tls {
			l.TLS = append(l.TLS, s.tls[i].rule.Name())
		}
		for i := range s.tcp {
			l.TCP = append(l.TCP, s.tcp[i].rule.Name())
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b Listed) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Port, b.Port))
	})
	return out
}
