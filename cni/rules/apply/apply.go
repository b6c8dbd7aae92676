// Package apply puts the rules of package rules into a network namespace, and takes them out again.
//
// It hides the iptables programs (run through go-iptables on a thread inside the namespace), netlink, and the order of
// steps that keeps a half-made rule set from ever steering a packet. It does not decide what the rules are or whose
// namespace gets them.
package apply

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"github.com/mistnet/mistnet/cni/rules"
)

// Namespace is where rules go. Do runs fn on a thread inside it; *linux.NetNS is one, and its nil value is the caller's
// own namespace.
type Namespace interface {
	Do(fn func() error) error
}

// lockSeconds is how long an iptables program waits for another one to finish.
const lockSeconds = 5

// IPTables applies rules with the host's own iptables and ip6tables, of whichever kind (nf_tables or legacy) they are.
// Its methods may be called at the same time for different namespaces, not for the same one.
type IPTables struct {
	v4, v6 family
}

// family is the programs of one address family.
type family struct {
	*iptables.IPTables
	save, restore program
}

// NewIPTables finds the programs. Path names the IPv4 one, a bare name or a path; "" means "iptables". The IPv6 one is
// its neighbour whose name begins with ip6tables instead.
func NewIPTables(path string) (*IPTables, error) {
	if path == "" {
		path = "iptables"
	}
	dir, name := filepath.Split(path)
	if !strings.HasPrefix(name, "iptables") {
		return nil, fmt.Errorf("find iptables: %q is not named iptables…, so its IPv6 twin cannot be found", path)
	}
	v4, err := find(iptables.ProtocolIPv4, path)
	if err != nil {
		return nil, fmt.Errorf("find iptables (is the package iptables installed?): %w", err)
	}
	v6, err := find(iptables.ProtocolIPv6, dir+"ip6tables"+strings.TrimPrefix(name, "iptables"))
	if err != nil {
		return nil, fmt.Errorf("find ip6tables: %w", err)
	}
	return &IPTables{v4: v4, v6: v6}, nil
}

func find(protocol iptables.Protocol, path string) (f family, err error) {
	f.IPTables, err = iptables.New(iptables.IPFamily(protocol), iptables.Timeout(lockSeconds), iptables.Path(path))
	if err != nil {
		return f, err
	}
	if f.save, err = sibling(path, "-save"); err != nil {
		return f, err
	}
	f.restore, err = sibling(path, "-restore")
	return f, err
}

// Apply makes the namespace hold exactly the rule set's chains, connected first in their built-in chains, and its
// routes. It reports whether anything had to change. What is right already is not touched, so live traffic does not
// notice a second Apply.
//
// All chains are complete, and the routes in place, before the first jump is inserted; redirections are connected last.
// In a namespace that holds nothing of ours this takes one look and one program for each family, which changes a table at
// once. A chain that is wrong is replaced by a finished one: the old one steers packets until the new one does. After an error
// the namespace may hold a part of the rules: call Apply again, or Remove.
//
// A namespace without IPv6 in its kernel gets the IPv4 part; one where IPv6 is switched off gets all rules, lest an
// application that switches it on again escapes.
func (t *IPTables) Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error) {
	err = ns.Do(func() error {
		ipv6 := hasIPv6()
		var connect []func() error
		for _, f := range t.families(rs, ipv6) {
			jumps, did, err := prepare(f)
			changed = changed || did
			if err != nil {
				return err
			}
			connect = append(connect, jumps...)
		}
		for _, r := range rs.Routes {
			if r.IPv6 && !ipv6 {
				continue
			}
			did, err := addRoute(r)
			changed = changed || did
			if err != nil {
				return err
			}
		}
		for _, jump := range connect {
			if err := jump(); err != nil {
				return err
			}
		}
		return nil
	})
	return changed, wrap("apply redirection rules", err)
}

// Remove takes everything of ours out of the namespace, whichever options it was applied with: redirections first, so
// that no connection is captured without its exceptions. Other chains and rules stay. Nothing to remove is no error.
// What the pod sends on connections that were captured still goes to ztunnel, until they end; connections ztunnel opened
// to the application under another's address no longer find their way back, and end.
func (t *IPTables) Remove(ns Namespace, rs rules.Ruleset) error {
	return wrap("remove redirection rules", ns.Do(func() error {
		ipv6 := hasIPv6()
		errs := []error{removeChains(t.families(rules.Ruleset{}, ipv6), "nat", "raw", "mangle")}
		for _, r := range rs.Routes {
			if !r.IPv6 || ipv6 {
				errs = append(errs, removeRoute(r))
			}
		}
		return errors.Join(errs...)
	}))
}

// Verify returns an error that names the first thing that is not as Apply would leave it, and nil when all is. It
// changes nothing.
func (t *IPTables) Verify(ns Namespace, rs rules.Ruleset) error {
	return wrap("verify redirection rules", ns.Do(func() error {
		ipv6 := hasIPv6()
		for _, f := range t.families(rs, ipv6) {
			if err := verify(f); err != nil {
				return err
			}
		}
		for _, r := range rs.Routes {
			if r.IPv6 && !ipv6 {
				continue
			}
			if err := verifyRoute(r); err != nil {
				return err
			}
		}
		return nil
	}))
}

// verify checks every table we use, those too in which no chain is wanted.
func verify(f familyRules) error {
	have, err := f.ipt.read()
	if err != nil {
		return err
	}
	for _, table := range f.tables {
		for _, name := range f.owned {
			i := slices.IndexFunc(f.chains, func(c rules.Chain) bool { return c.Table == table && c.Name == name })
			there := have.has(table, name)
			switch {
			case i < 0 && there:
				return fmt.Errorf("table %s has a chain %s too many", table, name)
			case i < 0:
			case !there:
				return fmt.Errorf("table %s has no chain %s", table, name)
			default:
				if err := have.verify(f.chains[i]); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

type familyRules struct {
	ipt    family
	chains []rules.Chain
	// Chains of these names in these tables are ours, and must go when they are not among chains.
	owned, tables []string
}

func (t *IPTables) families(rs rules.Ruleset, ipv6 bool) []familyRules {
	fs := []familyRules{{t.v4, rs.IPv4, ours, tables}}
	if ipv6 {
		fs = append(fs, familyRules{t.v6, rs.IPv6, ours, tables})
	}
	return fs
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// prepare makes every chain of a family right and returns what remains to be done to connect those that are not, in
// order.
func prepare(f familyRules) (connect []func() error, changed bool, err error) {
	have, err := f.ipt.read()
	if err != nil {
		return nil, changed, err
	}
	if !have.any(f) {
		return []func() error{func() error { return f.ipt.restore.run(rules.Script(f.chains)) }}, true, nil
	}
	for _, table := range f.tables { // a chain the options no longer ask for
		for _, name := range f.owned {
			wanted := slices.ContainsFunc(f.chains, func(c rules.Chain) bool { return c.Table == table && c.Name == name })
			if !wanted && have.has(table, name) {
				changed = true
				if err := removeChain(f.ipt, table, name); err != nil {
					return nil, changed, err
				}
			}
		}
	}
	for _, c := range f.chains {
		exists := have.has(c.Table, c.Name)
		if exists && have.holds(c) {
			if !slices.Equal(positions(have[c.Table][c.From], c.Name), []int{1}) {
				changed = true
				connect = append(connect, func() error { return connectChain(f.ipt, c, c.Name) })
			}
			continue
		}
		changed = true
		name := c.Name
		if exists {
			name = staged(c.Name)
			if have.has(c.Table, name) { // an Apply that was interrupted
				if err := removeChain(f.ipt, c.Table, name); err != nil {
					return nil, changed, err
				}
			}
		}
		if err := build(f.ipt, c, name); err != nil {
			return nil, changed, err
		}
		connect = append(connect, func() error { return connectChain(f.ipt, c, name) })
	}
	return connect, changed, nil
}

// What a pod's namespace may hold of ours.
var (
	ours   = []string{rules.ChainPrerouting, rules.ChainOutput}
	tables = []string{"mangle", "raw", "nat"}
)

// staged is what a chain is called while it waits to replace one.
func staged(name string) string { return name + "_NEW" }

func build(ipt family, c rules.Chain, name string) error {
	if err := ipt.NewChain(c.Table, name); err != nil {
		return err
	}
	for _, r := range c.Rules {
		if err := ipt.Append(c.Table, name, r...); err != nil {
			return err
		}
	}
	return nil
}

// connectChain makes the jump to the chain called name the first rule of c.From. If that is a staged chain, it then
// takes the old one's place and name.
func connectChain(ipt family, c rules.Chain, name string) error {
	if err := ipt.Insert(c.Table, c.From, 1, "-j", name); err != nil {
		return err
	}
	at, err := jumps(ipt, c.Table, c.From, c.Name)
	if err != nil {
		return err
	}
	for _, position := range slices.Backward(at) {
		if name == c.Name && position == 1 {
			continue
		}
		if err := ipt.DeleteById(c.Table, c.From, position); err != nil {
			return err
		}
	}
	if name == c.Name {
		return nil
	}
	if err := ipt.ClearAndDeleteChain(c.Table, c.Name); err != nil {
		return err
	}
	return ipt.RenameChain(c.Table, name, c.Name)
}

// jumps returns the positions, from 1, of the rules of chain that jump to target without a condition.
func jumps(ipt family, table, chain, target string) ([]int, error) {
	have, err := list(ipt, table, chain)
	return positions(have, target), err
}

func list(ipt family, table, chain string) ([]rules.Rule, error) {
	lines, err := ipt.List(table, chain)
	if err != nil {
		return nil, err
	}
	var out []rules.Rule
	for _, line := range lines {
		if words := strings.Fields(line); len(words) > 2 && words[0] == "-A" && words[1] == chain {
			out = append(out, words[2:])
		}
	}
	return out, nil
}

// removeChains takes the families' own chains out of the tables, staged ones too. All of them are disconnected, in the
// order of the tables, before the first is taken apart, which takes a while: deletions wait for packets under way.
func removeChains(families []familyRules, from ...string) error {
	var errs []error
	var remove []func() error
	for _, table := range from {
		for _, f := range families {
			names, err := f.ipt.ListChains(table)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			for _, name := range f.owned {
				for _, name := range []string{name, staged(name)} {
					if slices.Contains(names, name) {
						errs = append(errs, disconnect(f.ipt, table, name))
						remove = append(remove, func() error { return f.ipt.ClearAndDeleteChain(table, name) })
					}
				}
			}
		}
	}
	for _, fn := range remove {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// disconnect removes every jump to the chain from a built-in one.
func disconnect(ipt family, table, name string) error {
	builtin := []string{"PREROUTING", "OUTPUT"}
	if table == "nat" {
		builtin = append(builtin, "POSTROUTING")
	}
	for _, from := range builtin {
		at, err := jumps(ipt, table, from, name)
		if err != nil {
			return err
		}
		for _, position := range slices.Backward(at) {
			if err := ipt.DeleteById(table, from, position); err != nil {
				return err
			}
		}
	}
	return nil
}

func removeChain(ipt family, table, name string) error {
	if err := disconnect(ipt, table, name); err != nil {
		return err
	}
	return ipt.ClearAndDeleteChain(table, name)
}

// hasIPv6 reports whether the kernel speaks IPv6 in the namespace of the calling thread.
func hasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}
