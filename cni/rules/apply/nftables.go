package apply

import (
	"cmp"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/cni/rules"
)

// NFTables applies rules with nf_tables: both families and everything at once. Nft makes each set of rules once, in a namespace
// of its own; what the kernel then holds is copied into those of pods, without a program.
type NFTables struct {
	nft program

	mu     sync.Mutex
	models map[string]recorded // what nft makes of scripts, by script
}

// NewNFTables finds the program; path is a name or a path, "" means "nft".
func NewNFTables(path string) (*NFTables, error) {
	if path == "" {
		path = "nft"
	}
	found, err := exec.LookPath(path)
	if err != nil {
		return nil, fmt.Errorf("find nft (is the package nftables installed?): %w", err)
	}
	return &NFTables{nft: program{found, filepath.Base(found)}, models: make(map[string]recorded)}, nil
}

// Apply does what IPTables.Apply does, but all at once: after an error only routes may be there.
func (t *NFTables) Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error) {
	want, err := t.model(rs)
	if err != nil {
		return false, wrap("apply redirection rules", err)
	}
	err = ns.Do(func() error {
		seen, err := beginHere(rs.Routes)
		changed = seen.changed
		if err != nil {
			return err
		}
		if len(seen.ours) > 0 {
			have, err := record(nftOurs)
			if err != nil || want.compare(have) == nil {
				return err
			}
		}
		changed = true
		return commit(want.changes(seen.ours))
	})
	return changed, wrap("apply redirection rules", err)
}

// Release does what IPTables.Release does.
func (t *NFTables) Release(ns Namespace) error {
	return wrap("end redirection", t.change(ns, func(ours []string) []message {
		if len(ours) == 0 {
			return nil
		}
		return release()
	}))
}

// Remove does what IPTables.Remove does.
func (t *NFTables) Remove(ns Namespace, rs rules.Ruleset) error {
	return wrap("remove redirection rules", errors.Join(t.clear(ns), removeRoutes(ns, rs.Routes)))
}

// clear takes our tables away.
func (t *NFTables) clear(ns Namespace) error { return t.change(ns, recorded{}.changes) }

// change makes the changes that those of our tables need which are there.
func (t *NFTables) change(ns Namespace, to func(ours []string) []message) error {
	return ns.Do(func() error {
		seen, err := lookHere()
		if err == nil {
			err = commit(to(seen.ours))
		}
		return err
	})
}

// Verify does what IPTables.Verify does.
func (t *NFTables) Verify(ns Namespace, rs rules.Ruleset) error {
	want, err := t.model(rs)
	if err == nil {
		err = ns.Do(func() error {
			have, err := record(nftOurs)
			return cmp.Or(err, want.compare(have), verifyRoutes(rs.Routes, hasIPv6()))
		})
	}
	return wrap("verify redirection rules", err)
}

// nftOurs are the tables that nft makes for us.
func nftOurs(family, table string) bool { return family == "inet" && isOurs(table) }

func (t *NFTables) run(script string) error { return t.nft.run(script, "-f", "-") }

// learn makes models of rule sets, which the first pod of each else waits for.
func (t *NFTables) learn(sets ...rules.Ruleset) error {
	for _, rs := range sets {
		if _, err := t.model(rs); err != nil {
			return err
		}
	}
	return nil
}

// model has nft make the rule set in a namespace for that, and records it. That the kernel takes the record for what it gave
// it for is tried there too.
func (t *NFTables) model(rs rules.Ruleset) (recorded, error) {
	script := rules.NFT(rs.Tables)
	t.mu.Lock()
	defer t.mu.Unlock()
	if m, ok := t.models[script]; ok {
		return m, nil
	}
	var m recorded
	err := scratch(func() (err error) {
		if err = t.run(script); err != nil {
			return err
		}
		if m, err = record(nftOurs); err != nil {
			return err
		}
		seen, err := lookHere()
		if err != nil {
			return err
		}
		if m.hasSets() {
			return errors.New("rules of pods refer to sets, which are not copied")
		}
		if err := commit(m.changes(seen.ours)); err != nil {
			return err
		}
		copied, err := record(nftOurs)
		if err != nil {
			return err
		}
		return wrap("what the kernel tells of rules is not what makes them", m.compare(copied))
	})
	if err != nil {
		return nil, fmt.Errorf("try rules out: %w", err)
	}
	t.models[script] = m
	return m, nil
}

// scratch runs fn in a network namespace of its own.
func scratch(fn func() error) error {
	done := make(chan error, 1) // one answer
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and its namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make network namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// nftTables lists the tables of the calling thread's namespace, as "family name": those that nft made, and those of the
// kind of iptables that uses nf_tables. A kernel without nf_tables has none.
func nftTables() ([]string, error) {
	var out []string
	err := dump(unix.NFT_MSG_GETTABLE, func(family uint8, of attributes) {
		out = append(out, familyName(family)+" "+of.name(unix.NFTA_TABLE_NAME))
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	return out, err
}

func familyName(family uint8) string {
	switch family {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	}
	return ""
}
