package apply

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/cni/rules"
)

func netlinkFamily(r rules.Route) int {
	if r.IPv6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// addRoute puts the route first and then the rule that leads to it, both only when missing. A device that is down is
// brought up: without loopback no redirection works, and every runtime brings it up.
func addRoute(r rules.Route) (changed bool, err error) {
	link, err := netlink.LinkByName(r.Device)
	if err != nil {
		return false, fmt.Errorf("find device %s: %w", r.Device, err)
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		changed = true
		if err := netlink.LinkSetUp(link); err != nil {
			return changed, fmt.Errorf("bring up %s: %w", r.Device, err)
		}
	}
	have, err := routes(r, link)
	if err != nil {
		return changed, err
	}
	if len(have) == 0 {
		changed = true
		if err := netlink.RouteReplace(route(r, link)); err != nil && !(r.IPv6 && ipv6Off(r.Device)) {
			return changed, fmt.Errorf("add route to table %d: %w", r.Table, err)
		}
	}
	leading, err := leadingRules(r)
	if err != nil {
		return changed, err
	}
	if len(leading) > 0 {
		return changed, nil
	}
	rule := netlink.NewRule()
	mask := r.Mask
	rule.Family, rule.Priority, rule.Table = netlinkFamily(r), r.Preference, r.Table
	rule.Mark, rule.Mask = r.Mark, &mask
	if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
		return true, fmt.Errorf("add ip rule for mark %#x: %w", r.Mark, err)
	}
	return true, nil
}

// verifyRoute reports what addRoute would have to add.
func verifyRoute(r rules.Route) error {
	link, err := netlink.LinkByName(r.Device)
	if err != nil {
		return fmt.Errorf("find device %s: %w", r.Device, err)
	}
	have, err := routes(r, link)
	if err != nil {
		return err
	}
	if len(have) == 0 && !(r.IPv6 && ipv6Off(r.Device)) {
		return fmt.Errorf("table %d does not route %s to %s", r.Table, r.Destination(), r.Device)
	}
	leading, err := leadingRules(r)
	if err == nil && len(leading) == 0 {
		err = fmt.Errorf("no ip rule leads packets with mark %#x to table %d", r.Mark, r.Table)
	}
	return err
}

// removeRoute undoes addRoute in the opposite order.
func removeRoute(r rules.Route) error {
	leading, err := leadingRules(r)
	if err != nil {
		return err
	}
	var errs []error
	for _, rule := range leading {
		rule.Family = netlinkFamily(r) // a listed rule does not carry it
		if err := netlink.RuleDel(&rule); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove ip rule for mark %#x: %w", r.Mark, err))
		}
	}
	link, err := netlink.LinkByName(r.Device)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("find device %s: %w", r.Device, err))...)
	}
	have, err := routes(r, link)
	errs = append(errs, err)
	for _, rt := range have {
		if err := netlink.RouteDel(&rt); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route from table %d: %w", r.Table, err))
		}
	}
	return errors.Join(errs...)
}

func route(r rules.Route, link netlink.Link) *netlink.Route {
	d := r.Destination()
	scope := netlink.SCOPE_HOST
	if r.IPv6 {
		scope = netlink.SCOPE_UNIVERSE
	}
	return &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Family:    netlinkFamily(r),
		Table:     r.Table,
		Type:      unix.RTN_LOCAL,
		Scope:     scope,
		Dst:       &net.IPNet{IP: d.Addr().AsSlice(), Mask: net.CIDRMask(0, d.Addr().BitLen())},
	}
}

// routes lists those of the route's table that are already what it asks for.
func routes(r rules.Route, link netlink.Link) ([]netlink.Route, error) {
	all, err := netlink.RouteListFiltered(netlinkFamily(r), &netlink.Route{Table: r.Table}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list table %d: %w", r.Table, err)
	}
	var out []netlink.Route
	for _, rt := range all {
		everywhere := rt.Dst == nil
		if rt.Dst != nil {
			ones, _ := rt.Dst.Mask.Size()
			everywhere = ones == 0
		}
		if everywhere && rt.Type == unix.RTN_LOCAL && rt.LinkIndex == link.Attrs().Index {
			out = append(out, rt)
		}
	}
	return out, nil
}

// leadingRules lists the ip rules that are already what the route asks for.
func leadingRules(r rules.Route) ([]netlink.Rule, error) {
	all, err := netlink.RuleList(netlinkFamily(r))
	if err != nil {
		return nil, fmt.Errorf("list ip rules: %w", err)
	}
	var out []netlink.Rule
	for _, rule := range all {
		if rule.Priority == r.Preference && rule.Table == r.Table && rule.Mark == r.Mark &&
			rule.Mask != nil && *rule.Mask == r.Mask {
			out = append(out, rule)
		}
	}
	return out, nil
}

// ipv6Off reports whether IPv6 is switched off on the device, in the namespace of the calling thread.
func ipv6Off(device string) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + device + "/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}
