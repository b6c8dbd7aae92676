// Package apply puts the rules of package rules into a network namespace, and takes them out again.
//
// It hides the programs (iptables and its kin, or nft, run on a thread inside the namespace), netlink, and the order of
// steps that keeps a half-made rule set from ever steering a packet. It does not decide what the rules are or whose
// namespace gets them.
package apply

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/mistnet/mistnet/cni/rules"
)

// Namespace is where rules go. Do runs fn on a thread inside it, and may be called several times at once; *linux.NetNS is
// one, and its nil value is the caller's own namespace.
type Namespace interface {
	Do(fn func() error) error
}

// program is one that is run, by the name it is called by.
type program struct{ path, name string }

// sibling finds the program whose name is that of iptables and an ending. Where it is not installed by that name it is
// part of iptables itself, which does what it is called by.
func sibling(iptables, ending string) (program, error) {
	if path, err := exec.LookPath(iptables + ending); err == nil {
		return program{path, filepath.Base(path)}, nil
	}
	path, err := exec.LookPath(iptables)
	if err != nil {
		return program{}, err
	}
	name := filepath.Base(iptables) + ending
	out, err := (&exec.Cmd{Path: path, Args: []string{name, "--version"}}).Output()
	said, _, _ := strings.Cut(string(out), " ") // legacy ones leave their kind out
	if err != nil || !strings.HasPrefix(said, "ip") || !strings.HasSuffix(said, ending) {
		return program{}, fmt.Errorf("%s is missing beside %s", name, path)
	}
	return program{path, name}, nil
}

func (p program) command(args ...string) *exec.Cmd {
	return &exec.Cmd{Path: p.path, Args: append([]string{p.name}, args...)}
}

// run feeds a script to the program.
func (p program) run(script string, args ...string) error {
	cmd := p.command(args...)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, bytes.TrimSpace(out))
	}
	return nil
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// sight is what a first look at a namespace tells, without a program.
type sight struct {
	ipv6     bool
	iptables bool     // there are tables that iptables made, of either kind
	ours     []string // names of tables of ours that nft made
	others   []string // tables that nft made, as "family name"
	changed  bool     // routes were added
}

// look takes it.
func look(ns Namespace) (s sight, err error) {
	err = ns.Do(func() error { s, err = lookHere(); return err })
	return s, err
}

func lookHere() (s sight, err error) {
	s.ipv6 = hasIPv6()
	have, err := nftTables()
	if err != nil {
		return s, err
	}
	for _, t := range have {
		family, name, _ := strings.Cut(t, " ")
		switch {
		case nftOurs(family, name):
			s.ours = append(s.ours, name)
		case isIPTables(family, name):
			s.iptables = true
		default:
			s.others = append(s.others, t)
		}
	}
	for _, legacy := range []string{"ip_tables_names", "ip6_tables_names"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + legacy)
		s.iptables = s.iptables || err == nil && len(bytes.TrimSpace(b)) > 0
	}
	return s, nil
}

func isOurs(table string) bool {
	return table == rules.TableMangle || table == rules.TableRaw || table == rules.TableNAT
}

// isIPTables reports whether a table is one that iptables makes when it is of the kind that uses nf_tables.
func isIPTables(family, table string) bool {
	switch table {
	case "nat", "mangle", "raw", "filter", "security":
		return family == "ip" || family == "ip6"
	}
	return false
}

// begin looks at a namespace and puts the routes there.
func begin(ns Namespace, routes []rules.Route) (s sight, err error) {
	err = ns.Do(func() error { s, err = beginHere(routes); return err })
	return s, err
}

func beginHere(routes []rules.Route) (s sight, err error) {
	if s, err = lookHere(); err != nil {
		return s, err
	}
	for _, r := range routes {
		if r.IPv6 && !s.ipv6 {
			continue
		}
		did, err := addRoute(r)
		s.changed = s.changed || did
		if err != nil {
			return s, err
		}
	}
	return s, nil
}

func removeRoutes(ns Namespace, routes []rules.Route) error {
	return ns.Do(func() error {
		ipv6 := hasIPv6()
		var errs []error
		for _, r := range routes {
			if !r.IPv6 || ipv6 {
				errs = append(errs, removeRoute(r))
			}
		}
		return errors.Join(errs...)
	})
}

func verifyRoutes(routes []rules.Route, ipv6 bool) error {
	for _, r := range routes {
		if r.IPv6 && !ipv6 {
			continue
		}
		if err := verifyRoute(r); err != nil {
			return err
		}
	}
	return nil
}

// hasIPv6 reports whether the kernel speaks IPv6 in the namespace of the calling thread.
func hasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}
