package apply

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/cni/rules"
)

// NFTables applies rules with nft: one program for both families, and everything at once.
type NFTables struct {
	nft program

	mu     sync.Mutex
	models map[string]listing // how nft prints scripts, by script
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
	return &NFTables{nft: program{found, filepath.Base(found)}, models: make(map[string]listing)}, nil
}

// Apply does what IPTables.Apply does. In a namespace without tables of ours it takes one program.
func (t *NFTables) Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error) {
	seen, err := begin(ns, rs.Routes)
	if err == nil {
		script := rules.NFT(rs.Tables)
		if !seen.nft || t.compare(ns, script) != nil {
			seen.changed = true
			err = ns.Do(func() error { return t.run(script) })
		}
	}
	return seen.changed, wrap("apply redirection rules", err)
}

// Release does what IPTables.Release does.
func (t *NFTables) Release(ns Namespace) error {
	seen, err := look(ns)
	if err == nil && seen.nft {
		err = ns.Do(func() error { return t.run(rules.NFTRelease()) })
	}
	return wrap("end redirection", err)
}

// Remove does what IPTables.Remove does.
func (t *NFTables) Remove(ns Namespace, rs rules.Ruleset) error {
	return wrap("remove redirection rules", errors.Join(t.clear(ns), removeRoutes(ns, rs.Routes)))
}

// clear takes our tables away.
func (t *NFTables) clear(ns Namespace) error {
	seen, err := look(ns)
	if err == nil && seen.nft {
		err = ns.Do(func() error { return t.run(rules.NFT(nil)) })
	}
	return err
}

// Verify does what IPTables.Verify does.
func (t *NFTables) Verify(ns Namespace, rs rules.Ruleset) error {
	err := t.compare(ns, rules.NFT(rs.Tables))
	if err == nil {
		err = ns.Do(func() error { return verifyRoutes(rs.Routes, hasIPv6()) })
	}
	return wrap("verify redirection rules", err)
}

func (t *NFTables) run(script string) error { return t.nft.run(script, "-f", "-") }

// listing is the rules of our tables as nft prints them, by table and chain.
type listing map[string][]string

// compare returns how the namespace differs from one in which the script alone was run.
func (t *NFTables) compare(ns Namespace, script string) error {
	want, err := t.model(script)
	if err != nil {
		return err
	}
	var have listing
	if err := ns.Do(func() error { have, err = t.list(); return err }); err != nil {
		return err
	}
	for _, chain := range sortedKeys(want) {
		if lines, ok := have[chain]; !ok {
			return fmt.Errorf("there is no %s", chain)
		} else if !slices.Equal(lines, want[chain]) {
			return fmt.Errorf("%s holds other rules", chain)
		}
	}
	for _, chain := range sortedKeys(have) {
		if _, ok := want[chain]; !ok {
			return fmt.Errorf("there is a %s too many", chain)
		}
	}
	return nil
}

// model runs the script in a namespace made for that, and lists what it made. Every version of nft prints rules in its own
// way, which is compared with itself.
func (t *NFTables) model(script string) (listing, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m, ok := t.models[script]; ok {
		return m, nil
	}
	var m listing
	err := scratch(func() (err error) {
		if err = t.run(script); err == nil {
			m, err = t.list()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("try rules out: %w", err)
	}
	t.models[script] = m
	return m, nil
}

// list lists our tables in the namespace of the calling thread. Members of sets are left out.
func (t *NFTables) list() (listing, error) {
	cmd := t.nft.command("-t", "list", "ruleset", "inet")
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s list: %w: %s", t.nft.name, err, bytes.TrimSpace(problem.Bytes()))
	}
	l, table, block := listing{}, "", ""
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case words[0] == "table" && len(words) > 2:
			table, block = words[2], ""
		case !isOurs(table):
		case words[len(words)-1] == "{" && block == "":
			block = strings.Join(words[:len(words)-1], " ") + " of table " + table
			l[block] = []string{}
		case words[0] == "}":
			block = ""
		case block != "":
			l[block] = append(l[block], strings.Join(words, " "))
		}
	}
	return l, nil
}

func sortedKeys(l listing) []string {
	keys := make([]string, 0, len(l))
	for k := range l {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
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
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	answers, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list tables of nftables: %w", err)
	}
	families := map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}
	var out []string
	for _, b := range answers {
		attrs, err := nl.ParseRouteAttr(b[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, fmt.Errorf("list tables of nftables: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_TABLE_NAME {
				out = append(out, families[b[0]]+" "+strings.TrimRight(string(a.Value), "\x00"))
			}
		}
	}
	return out, nil
}
