package apply

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/cni/rules"
)

// recorded is what tables hold, as the kernel tells it. Said to the kernel of another namespace, it makes the same there: what
// a program made of rules once need not be made of them again, nor be spelled here.
type recorded []object

// object is a table, a chain or a rule: tables first, each before what is in it, rules in order.
type object struct {
	kind   int // of the message that makes it
	family uint8
	table  string
	block  string // chain or set, "" for the table itself
	says   []byte // its attributes
	notes  []byte // attributes that are not compared: for readers only, or not told by the kernel
}

// record reads the wanted tables in the namespace of the calling thread. Of sets it takes the names only.
func record(wanted func(family, table string) bool) (recorded, error) {
	var tables, chains, sets, ruled recorded
	err := errors.Join(
		dump(unix.NFT_MSG_GETTABLE, func(family uint8, of attributes) {
			tables = append(tables, object{
				unix.NFT_MSG_NEWTABLE, family, of.name(unix.NFTA_TABLE_NAME), "",
				of.encode(unix.NFTA_TABLE_NAME, unix.NFTA_TABLE_FLAGS), of.encode(nftaTableUserdata),
			})
		}),
		dump(unix.NFT_MSG_GETCHAIN, func(family uint8, of attributes) {
			chains = append(chains, object{
				unix.NFT_MSG_NEWCHAIN, family, of.name(unix.NFTA_CHAIN_TABLE), "chain " + of.name(unix.NFTA_CHAIN_NAME),
				of.encode(unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE),
				of.encode(nftaChainUserdata),
			})
		}),
		dump(unix.NFT_MSG_GETSET, func(family uint8, of attributes) {
			name := of.name(unix.NFTA_SET_NAME)
			sets = append(sets, object{unix.NFT_MSG_NEWSET, family, of.name(unix.NFTA_SET_TABLE), "set " + name, []byte(name), nil})
		}),
		dump(unix.NFT_MSG_GETRULE, func(family uint8, of attributes) {
			ruled = append(ruled, object{
				unix.NFT_MSG_NEWRULE, family, of.name(unix.NFTA_RULE_TABLE), "chain " + of.name(unix.NFTA_RULE_CHAIN),
				of.encode(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_EXPRESSIONS),
				append(of.encode(unix.NFTA_RULE_USERDATA), compat(of[unix.NFTA_RULE_EXPRESSIONS])...),
			})
		}),
	)
	all := slices.Concat(tables, chains, sets, ruled)
	return slices.DeleteFunc(all, func(o object) bool { return !wanted(familyName(o.family), o.table) }), err
}

// compat is what a rule must say of itself besides its expressions when one of them is an extension of iptables: the protocol it
// is about, which extensions for one protocol insist on. The kernel does not tell it, but its expressions do.
func compat(expressions []byte) []byte {
	list, err := nl.ParseRouteAttr(expressions)
	if err != nil {
		return nil
	}
	loaded := false // the expression before loads the packet's protocol
	for _, e := range list {
		x, err := decode(e.Value)
		if err != nil {
			return nil
		}
		name, of := x.name(unix.NFTA_EXPR_NAME), x.in(unix.NFTA_EXPR_DATA)
		op, compares := of.number(unix.NFTA_CMP_OP)
		protocol := of.in(unix.NFTA_CMP_DATA)[unix.NFTA_DATA_VALUE]
		if loaded && name == "cmp" && compares && op == unix.NFT_CMP_EQ && len(protocol) == 1 {
			rule := nl.NewRtAttr(unix.NFTA_RULE_COMPAT, nil)
			rule.AddRtAttr(unix.NFTA_RULE_COMPAT_PROTO, nl.BEUint32Attr(uint32(protocol[0])))
			rule.AddRtAttr(unix.NFTA_RULE_COMPAT_FLAGS, nl.BEUint32Attr(0))
			return rule.Serialize()
		}
		key, ok := of.number(unix.NFTA_META_KEY)
		loaded = name == "meta" && ok && key == unix.NFT_META_L4PROTO
	}
	return nil
}

// listing is what tables hold, by table, chain and set.
type listing map[string][]string

func (r recorded) listing() listing {
	l := listing{}
	for _, o := range r {
		key := "table " + o.table
		if o.block != "" {
			key = o.block + " of " + key
		}
		l[key] = append(l[key], string(o.says))
	}
	return l
}

// compare returns how what is there differs from what was recorded, both of one family.
func (r recorded) compare(now recorded) error {
	want, have := r.listing(), now.listing()
	for _, block := range slices.Sorted(maps.Keys(want)) {
		if lines, ok := have[block]; !ok {
			return fmt.Errorf("there is no %s", block)
		} else if !slices.Equal(lines, want[block]) {
			return fmt.Errorf("%s holds other rules", block)
		}
	}
	for _, block := range slices.Sorted(maps.Keys(have)) {
		if _, ok := want[block]; !ok {
			return fmt.Errorf("there is a %s too many", block)
		}
	}
	return nil
}

// changes turn our tables of nft, of which the namespace has these, into what was recorded, all of them at once: chains that
// stay are emptied and filled anew, and tables that are not among those recorded go.
func (r recorded) changes(have []string) []message {
	var out []message
	for _, name := range have {
		if slices.ContainsFunc(r, func(o object) bool { return o.table == name }) {
			all := named(map[uint16]string{unix.NFTA_RULE_TABLE: name}).encode(unix.NFTA_RULE_TABLE)
			out = append(out, message{unix.NFT_MSG_DELRULE, 0, unix.NFPROTO_INET, all})
		} else {
			it := named(map[uint16]string{unix.NFTA_TABLE_NAME: name}).encode(unix.NFTA_TABLE_NAME)
			out = append(out, message{unix.NFT_MSG_DELTABLE, 0, unix.NFPROTO_INET, it})
		}
	}
	for _, o := range r {
		flags := unix.NLM_F_CREATE
		if o.kind == unix.NFT_MSG_NEWRULE {
			flags |= unix.NLM_F_APPEND
		}
		out = append(out, message{o.kind, flags, o.family, slices.Concat(o.says, o.notes)})
	}
	return out
}

// hasSets reports whether there is what cannot be said again.
func (r recorded) hasSets() bool {
	return slices.ContainsFunc(r, func(o object) bool { return o.kind == unix.NFT_MSG_NEWSET })
}

// release ends redirection and leaves the rest of the table.
func release() []message {
	var out []message
	for _, chain := range rules.NFTRedirection() {
		out = append(out, message{unix.NFT_MSG_DELRULE, 0, unix.NFPROTO_INET, named(map[uint16]string{
			unix.NFTA_RULE_TABLE: rules.TableNAT, unix.NFTA_RULE_CHAIN: chain,
		}).encode(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN)})
	}
	return out
}
