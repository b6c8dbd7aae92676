package apply

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mistnet/mistnet/cni/rules"
)

// Mode is the language rules are put in.
type Mode string

// Modes. With ModeAuto New looks which of the others fits the machine.
const (
	ModeAuto     Mode = "auto"
	ModeIPTables Mode = "iptables"
	ModeNFTables Mode = "nftables"
)

// Config says what New uses.
type Config struct {
	Mode     Mode
	IPTables string    // the program, see NewIPTables
	NFT      string    // the program, see NewNFTables
	Host     Namespace // the machine's, where ModeAuto looks around
}

// Redirector is what a mode does, in the namespaces of pods.
type Redirector interface {
	Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error)
	Release(ns Namespace) error
	Remove(ns Namespace, rs rules.Ruleset) error
	Verify(ns Namespace, rs rules.Ruleset) error
}

// Redirection puts rules into namespaces in one mode, and takes those of the other mode away wherever it finds them: pods
// live longer than an agent and its settings. Its methods may be called at the same time for different namespaces, not
// for the same one.
type Redirection struct {
	mode Mode
	why  string
	ipt  *IPTables // nil: there is none
	nft  *NFTables // nil: there is none
}

// New finds the programs, and fails when those of the mode are missing.
func New(c Config) (*Redirection, error) {
	r := &Redirection{mode: c.Mode, why: "as configured"}
	var noIPT, noNFT error
	r.ipt, noIPT = NewIPTables(c.IPTables)
	r.nft, noNFT = NewNFTables(c.NFT)
	switch c.Mode {
	case ModeIPTables:
		return r, noIPT
	case ModeNFTables:
		return r, noNFT
	case ModeAuto, "":
		return r, r.detect(c.Host, noIPT, noNFT)
	}
	return nil, fmt.Errorf("redirection mode %q: want %s, %s or %s", c.Mode, ModeAuto, ModeIPTables, ModeNFTables)
}

// Mode returns the mode, and why it is this one.
func (r *Redirection) Mode() (mode Mode, why string) { return r.mode, r.why }

// detect chooses iptables, unless it does not work here, or the machine's own services are made with nftables.
func (r *Redirection) detect(host Namespace, noIPT, noNFT error) error {
	try := rules.InPod(rules.Options{DNS: true})
	if noNFT == nil {
		noNFT = r.nft.learn(try)
	}
	if noIPT == nil {
		noIPT = r.ipt.learn(try)
	}
	seen, err := look(host)
	native := slices.ContainsFunc(seen.others, func(t string) bool { return t == "ip kube-proxy" || t == "ip6 kube-proxy" })
	switch {
	case noIPT != nil && noNFT != nil:
		return fmt.Errorf("no way to redirect traffic works: %w", errors.Join(noIPT, noNFT))
	case noIPT != nil:
		r.mode, r.why = ModeNFTables, "iptables does not work: "+noIPT.Error()
	case noNFT != nil:
		r.mode, r.why = ModeIPTables, "nftables does not work: "+noNFT.Error()
	case err == nil && native:
		r.mode, r.why = ModeNFTables, "kube-proxy uses it"
	default:
		r.mode, r.why = ModeIPTables, "it works here"
	}
	return nil
}

// Learn tries out rule sets that pods are to hold, in a namespace made for that: Apply then needs no program to put them where
// there is nothing yet. It is called before the others.
func (r *Redirection) Learn(sets ...rules.Ruleset) error {
	if r.mode == ModeNFTables {
		return r.nft.learn(sets...)
	}
	return r.ipt.learn(sets...)
}

func (r *Redirection) current() Redirector {
	if r.mode == ModeNFTables {
		return r.nft
	}
	return r.ipt
}

// dropOther takes the other mode's rules away, redirections and all, but no routes: both modes have the same.
func (r *Redirection) dropOther(ns Namespace, seen sight) (changed bool, err error) {
	switch {
	case r.mode == ModeIPTables && len(seen.ours) > 0 && r.nft != nil:
		return true, r.nft.clear(ns)
	case r.mode == ModeNFTables && seen.iptables && r.ipt != nil:
		return ensure(ns, seen, r.ipt.families(rules.Ruleset{}, seen.ipv6))
	}
	return false, nil
}

// Apply makes the namespace hold the rule set in this mode, and only then takes away the other's: the two mean the same.
func (r *Redirection) Apply(ns Namespace, rs rules.Ruleset) (changed bool, err error) {
	seen, err := look(ns)
	if err != nil {
		return false, wrap("apply redirection rules", err)
	}
	changed, err = r.current().Apply(ns, rs)
	if err != nil {
		return changed, err
	}
	did, err := r.dropOther(ns, seen)
	return changed || did, wrap("remove redirection rules of the other mode", err)
}

// Release ends redirection of new connections, in both modes.
func (r *Redirection) Release(ns Namespace) error {
	var errs []error
	if r.ipt != nil {
		errs = append(errs, r.ipt.Release(ns))
	}
	if r.nft != nil {
		errs = append(errs, r.nft.Release(ns))
	}
	return errors.Join(errs...)
}

// Remove takes out what either mode put in.
func (r *Redirection) Remove(ns Namespace, rs rules.Ruleset) error {
	seen, err := look(ns)
	if err == nil {
		_, err = r.dropOther(ns, seen)
	}
	return errors.Join(wrap("remove redirection rules of the other mode", err), r.current().Remove(ns, rs))
}

// Verify compares the namespace with the rule set in this mode.
func (r *Redirection) Verify(ns Namespace, rs rules.Ruleset) error { return r.current().Verify(ns, rs) }

// HostProbes lets the machine's own probes into captured pods.
type HostProbes interface {
	Allow(uid string, ips []netip.Addr) error
	Forbid(ips []netip.Addr) error
	Keep(pods map[string][]netip.Addr) error
	Remove() error
}

// NewHost makes the host's rules in this mode, takes over none of the other's members and removes what it left. What was
// let in before is let in again by Keep.
func (r *Redirection) NewHost(ns Namespace, h rules.Host) (HostProbes, error) {
	var made, other HostProbes
	var err error
	if r.mode == ModeNFTables {
		made, err = NewHostNFT(r.nft, ns, h)
		if r.ipt != nil {
			other = &Host{ipt: r.ipt, ns: ns, h: h}
		}
	} else {
		made, err = NewHost(r.ipt, ns, h)
		if r.nft != nil {
			other = &HostNFT{nft: r.nft, ns: ns, h: h}
		}
	}
	if err == nil && other != nil {
		err = other.Remove()
	}
	return made, err
}

// RemoveHost removes the host's rules of both modes.
func (r *Redirection) RemoveHost(ns Namespace, h rules.Host) error {
	var errs []error
	if r.ipt != nil {
		errs = append(errs, (&Host{ipt: r.ipt, ns: ns, h: h}).Remove())
	}
	if r.nft != nil {
		errs = append(errs, (&HostNFT{nft: r.nft, ns: ns, h: h}).Remove())
	}
	return errors.Join(errs...)
}
