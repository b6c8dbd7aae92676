package apply

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

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
			if _, err := f.rules.ensure(true); err != nil {
				return err
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
	inet  uint8
	rules familyRules
}

func (h *Host) families() []hostFamily {
	owned, nat := []string{rules.ChainPostrouting}, []string{"nat"}
	fs := []hostFamily{{h.h.IPv4, unix.AF_INET, familyRules{h.ipt.v4, h.h.IPv4.Chains, owned, nat}}}
	if hasIPv6() {
		fs = append(fs, hostFamily{h.h.IPv6, unix.AF_INET6, familyRules{h.ipt.v6, h.h.IPv6.Chains, owned, nat}})
	}
	return fs
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
			if seen.iptables {
				f.rules.chains = nil
				_, err := f.rules.ensure(true)
				errs = append(errs, err)
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
