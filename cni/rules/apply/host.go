package apply

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/cni/rules"
)

// Host holds the rules that let the machine's own probes into captured pods. Make it with NewHost.
type Host struct {
	ipt *IPTables
	ns  Namespace
	h   rules.Host
}

// NewHost makes the sets and the rules that refer to them. The namespace is the machine's. Sets that are there keep their
// members, so that probes pass while an agent is replaced: see Keep.
func NewHost(ipt *IPTables, ns Namespace, h rules.Host) (*Host, error) {
	host := &Host{ipt: ipt, ns: ns, h: h}
	err := ns.Do(func() error {
		for _, f := range host.families() {
			o := netlink.IpsetCreateOptions{Comments: true, Family: f.inet, Replace: true}
			if err := netlink.IpsetCreate(f.Set, "hash:ip", o); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("make ipset %s (does the kernel have ip_set?): %w", f.Set, err)
			}
			for _, c := range f.Chains {
				if err := f.connect(c); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, wrap("apply host probe rules", err)
	}
	return host, nil
}

type hostFamily struct {
	rules.HostFamily
	inet uint8
	ipt  *iptables.IPTables
}

func (h *Host) families() []hostFamily {
	fs := []hostFamily{{h.h.IPv4, unix.AF_INET, h.ipt.v4.rules}}
	if hasIPv6() {
		fs = append(fs, hostFamily{h.h.IPv6, unix.AF_INET6, h.ipt.v6.rules})
	}
	return fs
}

// connect makes one of the machine's tables hold the chain, entered first. Others have their rules there too, and change
// them at any time, so ours go in one by one, the jump last.
func (f hostFamily) connect(c rules.Chain) error {
	have, err := f.list(c.Table, c.Name)
	if err != nil || !slices.EqualFunc(have, c.Rules, rules.Same) {
		if err := f.ipt.ClearChain(c.Table, c.Name); err != nil { // or makes it
			return err
		}
		for _, r := range c.Rules {
			if err := f.ipt.Append(c.Table, c.Name, r...); err != nil {
				return err
			}
		}
	}
	if have, err = f.list(c.Table, c.From); err != nil {
		return err
	}
	at := positions(have, c.Name)
	if slices.Equal(at, []int{1}) {
		return nil
	}
	if err := f.ipt.Insert(c.Table, c.From, 1, c.Jump()...); err != nil {
		return err
	}
	for i := range slices.Backward(at) {
		if err := f.ipt.DeleteById(c.Table, c.From, at[i]+1); err != nil {
			return err
		}
	}
	return nil
}

// disconnect takes the chain away.
func (f hostFamily) disconnect(c rules.Chain) error {
	have, err := f.list(c.Table, c.From)
	if err != nil {
		return err
	}
	for range positions(have, c.Name) {
		if err := f.ipt.Delete(c.Table, c.From, c.Jump()...); err != nil {
			return err
		}
	}
	if there, err := f.ipt.ChainExists(c.Table, c.Name); err != nil || !there {
		return err
	}
	return f.ipt.ClearAndDeleteChain(c.Table, c.Name)
}

// list returns the rules of a chain.
func (f hostFamily) list(table, chain string) ([]rules.Rule, error) {
	lines, err := f.ipt.List(table, chain)
	if err != nil {
		return nil, err
	}
	var have []rules.Rule
	for _, line := range lines {
		if words := strings.Fields(line); len(words) > 2 && words[0] == "-A" {
			have = append(have, words[2:])
		}
	}
	return have, nil
}

// Allow lets probes reach the addresses of a pod. The UID is only a comment for whoever reads the set.
func (h *Host) Allow(uid string, ips []netip.Addr) error {
	return wrap("allow probes", h.each(ips, func(set string, ip netip.Addr) error {
		return netlink.IpsetAdd(set, &netlink.IPSetEntry{IP: ip.AsSlice(), Comment: uid, Replace: true})
	}))
}

// Forbid takes the addresses back. One that is not allowed is no error.
func (h *Host) Forbid(ips []netip.Addr) error {
	return wrap("forbid probes", h.each(ips, func(set string, ip netip.Addr) error {
		return netlink.IpsetDel(set, &netlink.IPSetEntry{IP: ip.AsSlice(), Replace: true})
	}))
}

// Keep allows these addresses, by UID, and no others.
func (h *Host) Keep(pods map[string][]netip.Addr) error {
	var ips []netip.Addr
	var errs []error
	for uid, of := range pods {
		ips = append(ips, of...)
		errs = append(errs, h.Allow(uid, of))
	}
	return errors.Join(append(errs, wrap("forbid probes", h.ns.Do(func() error {
		var errs []error
		for _, f := range h.families() {
			set, err := netlink.IpsetList(f.Set)
			if err != nil {
				errs = append(errs, fmt.Errorf("list ipset %s: %w", f.Set, err))
				continue
			}
			for _, e := range set.Entries {
				ip, ok := netip.AddrFromSlice(e.IP)
				if ok && slices.Contains(ips, ip.Unmap()) {
					continue
				}
				if err := netlink.IpsetDel(f.Set, &netlink.IPSetEntry{IP: e.IP, Replace: true}); err != nil {
					errs = append(errs, fmt.Errorf("ipset %s, %s: %w", f.Set, e.IP, err))
				}
			}
		}
		return errors.Join(errs...)
	})))...)
}

func (h *Host) each(ips []netip.Addr, do func(set string, ip netip.Addr) error) error {
	return h.ns.Do(func() error {
		var errs []error
		for _, ip := range ips {
			set := h.h.IPv4.Set
			if ip.Is6() {
				set = h.h.IPv6.Set
			}
			if err := do(set, ip); err != nil {
				errs = append(errs, fmt.Errorf("ipset %s, %s: %w", set, ip, err))
			}
		}
		return errors.Join(errs...)
	})
}

// Remove takes rules and sets away.
func (h *Host) Remove() error {
	return wrap("remove host probe rules", h.ns.Do(func() error {
		seen, err := lookHere()
		if err != nil {
			return err
		}
		var errs []error
		for _, f := range h.families() {
			for _, c := range f.Chains {
				if seen.iptables {
					errs = append(errs, f.disconnect(c))
				}
			}
			if err := netlink.IpsetDestroy(f.Set); err != nil && !isMissing(err) {
				errs = append(errs, fmt.Errorf("destroy ipset %s: %w", f.Set, err))
			}
		}
		return errors.Join(errs...)
	}))
}

// isMissing reports whether a set is not there, or its kind is not in the kernel at all.
func isMissing(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPROTONOSUPPORT)
}
