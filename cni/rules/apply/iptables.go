package apply

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/coreos/go-iptables/iptables"

	"github.com/mistnet/mistnet/cni/rules"
)

// lockSeconds is how long an iptables program waits for another one to finish.
const lockSeconds = 5

// IPTables applies rules with iptables and ip6tables, of whichever kind (nf_tables or legacy) they are: each family with one
// program, and each table at once.
type IPTables struct {
	v4, v6 family
	copies []copied
}

// family is the programs of one address family.
type family struct {
	save, restore program
	rules         *iptables.IPTables // one rule at a time, for tables that are not ours alone
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
	v4, err := find(path, iptables.ProtocolIPv4)
	if err != nil {
		return nil, fmt.Errorf("find iptables (is the package iptables installed?): %w", err)
	}
	v6, err := find(dir+"ip6tables"+strings.TrimPrefix(name, "iptables"), iptables.ProtocolIPv6)
	if err != nil {
		return nil, fmt.Errorf("find ip6tables: %w", err)
	}
	return &IPTables{v4: v4, v6: v6}, nil
}

func find(path string, protocol iptables.Protocol) (f family, err error) {
	f.rules, err = iptables.New(iptables.IPFamily(protocol), iptables.Path(path), iptables.Timeout(lockSeconds))
	if err != nil {
		return f, err
	}
	if f.save, err = sibling(path, "-save"); err != nil {
		return f, err
	}
	f.restore, err = sibling(path, "-restore")
	return f, err
}

// What a pod's namespace may hold of ours, in the order in which it is connected: redirections last.
var (
	ours   = []string{rules.ChainPrerouting, rules.ChainOutput}
	tables = []string{"mangle", "raw", "nat"}
)

// familyRules is what one family is to have.
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

// Apply makes the namespace hold exactly the rule set's chains, connected first in their built-in chains, and its
// routes. It reports whether anything had to change. What is right already is not touched, so live traffic does not
// notice a second Apply.
//
// The routes are there before the first rule, and each table changes at once, redirections last. In a namespace that has
// no rules at all this takes no program when the rule set was learned, and else one for each family; in others it takes
// two. After an error the namespace may hold a part of the rules: call Apply again, or Remove.
//
// A namespace without IPv6 in its kernel gets the IPv4 part; one where IPv6 is switched off gets all rules, lest an
// application that switches it on again escapes.
func (t *IPTables) Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error) {
	seen, err := begin(ns, rs.Routes)
	switch {
	case err != nil:
	case t.copy(ns, seen, rs):
		changed = true
	default:
		changed, err = ensure(ns, seen, t.families(rs, seen.ipv6))
	}
	return changed || seen.changed, wrap("apply redirection rules", err)
}

// copied is what the programs make of a rule set in an empty namespace.
type copied struct {
	of   rules.Ruleset
	ipv6 bool
	made recorded
}

// learn has the programs make rule sets in a namespace for that: Apply then copies what they made into namespaces that hold
// nothing yet, without a program. It is for the programs to judge, which must find in a copy what they would have made. What
// cannot be copied, such as all that legacy ones make, is left to them. Learn is not called at the same time as others.
func (t *IPTables) learn(sets ...rules.Ruleset) error {
	for _, rs := range sets {
		if slices.ContainsFunc(t.copies, func(c copied) bool { return reflect.DeepEqual(c.of, rs) }) {
			continue
		}
		c := copied{of: rs}
		err := scratch(func() (err error) {
			c.ipv6 = hasIPv6()
			for _, f := range t.families(rs, c.ipv6) {
				if _, err := f.ensure(false); err != nil {
					return err
				}
			}
			c.made, err = record(isIPTables)
			return err
		})
		if err != nil {
			return fmt.Errorf("try rules out: %w", err)
		}
		judged := scratch(func() error {
			if err := commit(c.made.changes(nil)); err != nil {
				return err
			}
			return t.verify(rs, c.ipv6)
		})
		if judged == nil {
			t.copies = append(t.copies, c)
		}
	}
	return nil
}

// copy makes a namespace without tables hold what the programs make of the rule set, both families at once, and reports
// whether it did. If not, nothing has changed.
func (t *IPTables) copy(ns Namespace, seen sight, rs rules.Ruleset) bool {
	i := slices.IndexFunc(t.copies, func(c copied) bool { return c.ipv6 == seen.ipv6 && reflect.DeepEqual(c.of, rs) })
	if i < 0 || seen.iptables {
		return false
	}
	return ns.Do(func() error { return commit(t.copies[i].made.changes(nil)) }) == nil
}

// Release ends redirection, of new connections: those that were redirected go on, in both directions, until Remove.
func (t *IPTables) Release(ns Namespace) error {
	return wrap("end redirection", t.without(ns, "nat"))
}

// Remove takes everything of ours out of the namespace, whichever options it was applied with: redirections first, so
// that no connection is captured without its exceptions. Other chains and rules stay. Nothing to remove is no error.
// What the pod sends on connections that were captured still goes to ztunnel, until they end; connections ztunnel opened
// to the application under another's address no longer find their way back, and end.
func (t *IPTables) Remove(ns Namespace, rs rules.Ruleset) error {
	err := t.without(ns, "nat", "raw", "mangle")
	return wrap("remove redirection rules", errors.Join(err, removeRoutes(ns, rs.Routes)))
}

// without takes our chains out of tables.
func (t *IPTables) without(ns Namespace, tables ...string) error {
	seen, err := look(ns)
	if err != nil {
		return err
	}
	fs := t.families(rules.Ruleset{}, seen.ipv6)
	for i := range fs {
		fs[i].tables = tables
	}
	_, err = ensure(ns, seen, fs)
	return err
}

// Verify returns an error that names the first thing that is not as Apply would leave it, and nil when all is. It
// changes nothing.
func (t *IPTables) Verify(ns Namespace, rs rules.Ruleset) error {
	seen, err := look(ns)
	if err != nil {
		return wrap("verify redirection rules", err)
	}
	return wrap("verify redirection rules", ns.Do(func() error {
		if err := t.verify(rs, seen.ipv6); err != nil {
			return err
		}
		return verifyRoutes(rs.Routes, seen.ipv6)
	}))
}

// verify is called on a thread inside the namespace.
func (t *IPTables) verify(rs rules.Ruleset, ipv6 bool) error {
	for _, f := range t.families(rs, ipv6) {
		have, err := f.ipt.read()
		if err != nil {
			return err
		}
		if err := have.verify(f); err != nil {
			return err
		}
	}
	return nil
}

// ensure makes every family right, both at a time.
func ensure(ns Namespace, seen sight, fs []familyRules) (changed bool, err error) {
	did, errs := make([]bool, len(fs)), make([]error, len(fs))
	var wg sync.WaitGroup
	for i, f := range fs {
		wg.Go(func() { errs[i] = ns.Do(func() (err error) { did[i], err = f.ensure(seen.iptables); return err }) })
	}
	wg.Wait()
	return slices.Contains(did, true), errors.Join(errs...)
}

// ensure is called on a thread inside the namespace. Used says whether there may be anything.
func (f familyRules) ensure(used bool) (changed bool, err error) {
	have := saved{}
	if used {
		if have, err = f.ipt.read(); err != nil {
			return false, err
		}
	}
	script := have.edit(f)
	if script == "" {
		return false, nil
	}
	return true, f.ipt.restore.run(script, "--noflush", "-w", strconv.Itoa(lockSeconds))
}

// staged is what earlier versions called a chain while it waited to replace one.
func staged(name string) string { return name + "_NEW" }

// edit is what iptables-restore must read so that each of the tables holds what it should, and nothing of ours besides. A
// chain that a script declares is emptied; all a script says of a table happens at once.
func (s saved) edit(f familyRules) string {
	var b strings.Builder
	for _, table := range f.tables {
		var declare, fill, connect, drop strings.Builder
		known := slices.Concat(f.owned)
		for _, name := range f.owned {
			known = append(known, staged(name))
		}
		for _, name := range known {
			i := slices.IndexFunc(f.chains, func(c rules.Chain) bool { return c.Table == table && c.Name == name })
			if i < 0 {
				if !s.has(table, name) {
					continue
				}
				for from, have := range s[table] {
					for range positions(have, name) {
						fmt.Fprintf(&drop, "-D %s -j %s\n", from, name)
					}
				}
				fmt.Fprintf(&drop, "-F %[1]s\n-X %[1]s\n", name)
				continue
			}
			c := f.chains[i]
			if !s.has(table, name) || !s.holds(c) {
				fmt.Fprintf(&declare, ":%s - [0:0]\n", name)
				for _, r := range c.Rules {
					fmt.Fprintf(&fill, "-A %s %s\n", name, r)
				}
			}
			if at := positions(s[table][c.From], name); !slices.Equal(at, []int{1}) {
				for range at {
					fmt.Fprintf(&connect, "-D %s %s\n", c.From, c.Jump())
				}
				fmt.Fprintf(&connect, "-I %s 1 %s\n", c.From, c.Jump())
			}
		}
		if steps := declare.String() + fill.String() + connect.String() + drop.String(); steps != "" {
			fmt.Fprintf(&b, "*%s\n%sCOMMIT\n", table, steps)
		}
	}
	return b.String()
}

// verify checks every table we use, those too in which no chain is wanted.
func (s saved) verify(f familyRules) error {
	for _, table := range f.tables {
		for _, name := range f.owned {
			i := slices.IndexFunc(f.chains, func(c rules.Chain) bool { return c.Table == table && c.Name == name })
			there := s.has(table, name)
			switch {
			case i < 0 && there:
				return fmt.Errorf("table %s has a chain %s too many", table, name)
			case i < 0:
			case !there:
				return fmt.Errorf("table %s has no chain %s", table, name)
			case !s.holds(f.chains[i]):
				return fmt.Errorf("chain %s of table %s holds other rules", name, table)
			case !slices.Equal(positions(s[table][f.chains[i].From], name), []int{1}):
				return fmt.Errorf("chain %s of table %s does not begin with a jump to %s", f.chains[i].From, table, name)
			}
		}
	}
	return nil
}

// read asks iptables-save.
func (f family) read() (saved, error) {
	cmd := f.save.command()
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", f.save.name, err, bytes.TrimSpace(problem.Bytes()))
	}
	return parse(string(out)), nil
}
