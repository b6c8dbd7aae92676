package netlab

import (
	"bytes"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
)

// Service is a ClusterIP as the nodes see it: address and ports, and who answers.
type Service struct {
	VIP   netip.Addr
	Ports []ServicePort
}

// ServicePort is one TCP port of a service. Without endpoints connections are reset.
type ServicePort struct {
	Port      uint16
	Endpoints []netip.AddrPort // of the VIP's family; one is drawn at random per connection
}

// SetService makes every node translate a service's address, as kube-proxy does, for pods and for the node's own
// processes. It replaces what was set for the same VIP; a service without ports is removed.
func (l *Lab) SetService(s Service) error {
	for _, p := range s.Ports {
		for _, e := range p.Endpoints {
			if e.Addr().Is4() != s.VIP.Is4() {
				return fmt.Errorf("set service %s: endpoint %s is of another family", s.VIP, e)
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	all := slices.DeleteFunc(slices.Clone(l.services), func(o Service) bool { return o.VIP == s.VIP })
	if len(s.Ports) > 0 {
		all = append(all, s)
	}
	rules := serviceRules(all)
	for _, n := range l.Nodes {
		if err := n.Do(func() error { return loadRules(rules) }); err != nil {
			return fmt.Errorf("set service %s on %s: %w", s.VIP, n.Name, err)
		}
	}
	l.services = all
	return nil
}

// loadRules runs an nft script in the namespace the caller is in; it is applied whole or not at all.
func loadRules(script string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// serviceRules is the nft script that replaces all services in one transaction. A pod that reaches itself by a service is
// masqueraded, or it would answer itself directly.
func serviceRules(all []Service) string {
	var jumps, chains, resets strings.Builder
	for _, s := range all {
		ip := "ip"
		if s.VIP.Is6() {
			ip = "ip6"
		}
		for _, p := range s.Ports {
			match := fmt.Sprintf("%s daddr %s tcp dport %d", ip, s.VIP, p.Port)
			if len(p.Endpoints) == 0 {
				fmt.Fprintf(&resets, "\t\t%s reject with tcp reset\n", match)
				continue
			}
			name := strings.NewReplacer(".", "_", ":", "_").Replace(fmt.Sprintf("svc_%s_%d", s.VIP, p.Port))
			var targets []string
			for i, e := range p.Endpoints {
				fmt.Fprintf(&chains, "\tchain %s_%d {\n\t\t%s saddr %s meta mark set meta mark or 0x4000\n\t\tmeta l4proto tcp dnat %s to %s\n\t}\n",
					name, i, ip, e.Addr(), ip, e)
				targets = append(targets, fmt.Sprintf("%d : goto %s_%d", i, name, i))
			}
			fmt.Fprintf(&jumps, "\t\t%s numgen random mod %d vmap { %s }\n", match, len(targets), strings.Join(targets, ", "))
		}
	}
	return fmt.Sprintf(`table inet netlab-services
delete table inet netlab-services
table inet netlab-services {
%[2]s	chain services {
%[1]s	}
	chain prerouting {
		type nat hook prerouting priority dstnat;
		jump services
	}
	chain output {
		type nat hook output priority -100;
		jump services
	}
	chain postrouting {
		type nat hook postrouting priority srcnat;
		meta mark and 0x4000 == 0x4000 masquerade
	}
	chain reset-forwarded {
		type filter hook forward priority filter;
%[3]s	}
	chain reset-local {
		type filter hook output priority filter;
%[3]s	}
}
`, jumps.String(), chains.String(), resets.String())
}
