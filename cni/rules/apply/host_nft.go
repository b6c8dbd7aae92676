package apply

import (
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

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
	script := rules.NFT([]rules.Table{h.Table})
	return host, wrap("apply host probe rules", ns.Do(func() error { return t.run(script) }))
}

// Allow does what Host.Allow does.
func (h *HostNFT) Allow(uid string, ips []netip.Addr) error {
	return wrap("allow probes", h.change(h.add(uid, ips)))
}

func (h *HostNFT) change(changes []message) error {
	return h.ns.Do(func() error { return commit(changes) })
}

func (h *HostNFT) add(uid string, ips []netip.Addr) []message {
	var out []message
	for _, ip := range ips {
		out = append(out, message{unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, unix.NFPROTO_INET, h.member(ip, uid)})
	}
	return out
}

// member is an address in its set, with a comment for readers. That has a place for one byte of length.
func (h *HostNFT) member(ip netip.Addr, comment string) []byte {
	set, element := h.h.IPv4.Set, nl.NewRtAttr(unix.NFTA_LIST_ELEM, nil)
	if ip.Is6() {
		set = h.h.IPv6.Set
	}
	element.AddRtAttr(unix.NFTA_SET_ELEM_KEY, nil).AddRtAttr(unix.NFTA_DATA_VALUE, ip.AsSlice())
	if comment != "" && len(comment) <= 128 && !strings.ContainsAny(comment, "\"\\\n") { // what nft takes, and can list
		const aComment = 0 // NFTNL_UDATA_SET_ELEM_COMMENT
		element.AddRtAttr(unix.NFTA_SET_ELEM_USERDATA, append([]byte{aComment, byte(len(comment) + 1)}, nl.ZeroTerminated(comment)...))
	}
	elements := nl.NewRtAttr(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nil)
	elements.AddChild(element)
	return append(h.in(set), elements.Serialize()...)
}

func (h *HostNFT) in(set string) []byte {
	return named(map[uint16]string{
		unix.NFTA_SET_ELEM_LIST_TABLE: h.h.Table.Name, unix.NFTA_SET_ELEM_LIST_SET: set,
	}).encode(unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET)
}

// Forbid does what Host.Forbid does.
func (h *HostNFT) Forbid(ips []netip.Addr) error {
	changes := h.add("", ips) // to delete what is not there is an error
	for _, ip := range ips {
		changes = append(changes, message{unix.NFT_MSG_DELSETELEM, 0, unix.NFPROTO_INET, h.member(ip, "")})
	}
	return wrap("forbid probes", h.change(changes))
}

// Keep does what Host.Keep does.
func (h *HostNFT) Keep(pods map[string][]netip.Addr) error {
	var changes []message
	for _, set := range []string{h.h.IPv4.Set, h.h.IPv6.Set} {
		changes = append(changes, message{unix.NFT_MSG_DELSETELEM, 0, unix.NFPROTO_INET, h.in(set)}) // all of them
	}
	for uid, ips := range pods {
		changes = append(changes, h.add(uid, ips)...)
	}
	return wrap("forbid probes", h.change(changes))
}

// Remove takes the table away.
func (h *HostNFT) Remove() error { return wrap("remove host probe rules", h.nft.clear(h.ns)) }
