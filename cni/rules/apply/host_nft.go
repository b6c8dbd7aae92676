package apply

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/mistnet/mistnet/cni/rules"
)

// HostNFT is Host with nftables. Make it with NewHostNFT.
type HostNFT struct {
	nft *NFTables
	ns  Namespace
	h   rules.Host
}

// NewHostNFT makes the table. Sets that are there keep their members.
func NewHostNFT(t *NFTables, ns Namespace, h rules.Host) (*HostNFT, error) {
	host := &HostNFT{nft: t, ns: ns, h: h}
	return host, wrap("apply host probe rules", host.run(rules.NFT([]rules.Table{h.Table})))
}

func (h *HostNFT) run(script string) error {
	return h.ns.Do(func() error { return h.nft.run(script) })
}

// Allow does what Host.Allow does.
func (h *HostNFT) Allow(uid string, ips []netip.Addr) error {
	return wrap("allow probes", h.run(h.add(uid, ips)))
}

func (h *HostNFT) add(uid string, ips []netip.Addr) string {
	var b strings.Builder
	for _, ip := range ips {
		comment := ""
		if !strings.ContainsAny(uid, "\"\\\n") && uid != "" && len(uid) <= 128 { // what nft takes
			comment = fmt.Sprintf(" comment %q", uid)
		}
		fmt.Fprintf(&b, "add element inet %s %s { %s%s }\n", h.h.Table.Name, h.set(ip), ip, comment)
	}
	return b.String()
}

func (h *HostNFT) set(ip netip.Addr) string {
	if ip.Is6() {
		return h.h.IPv6.Set
	}
	return h.h.IPv4.Set
}

// Forbid does what Host.Forbid does.
func (h *HostNFT) Forbid(ips []netip.Addr) error {
	var b strings.Builder
	b.WriteString(h.add("", ips)) // to delete what is not there is an error
	for _, ip := range ips {
		fmt.Fprintf(&b, "delete element inet %s %s { %s }\n", h.h.Table.Name, h.set(ip), ip)
	}
	return wrap("forbid probes", h.run(b.String()))
}

// Keep does what Host.Keep does.
func (h *HostNFT) Keep(pods map[string][]netip.Addr) error {
	var b strings.Builder
	for _, set := range []string{h.h.IPv4.Set, h.h.IPv6.Set} {
		fmt.Fprintf(&b, "flush set inet %s %s\n", h.h.Table.Name, set)
	}
	for uid, ips := range pods {
		b.WriteString(h.add(uid, ips))
	}
	return wrap("forbid probes", h.run(b.String()))
}

// Remove takes the table away.
func (h *HostNFT) Remove() error {
	seen, err := look(h.ns)
	if err == nil && seen.nft {
		err = h.run(rules.NFT(nil))
	}
	return wrap("remove host probe rules", err)
}
