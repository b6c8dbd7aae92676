package apply

import (
	"slices"
	"strings"

	"github.com/mistnet/mistnet/cni/rules"
)

// saved is what a namespace holds of one family: rules by table and chain, as iptables-save tells. Built-in chains are
// among them. A table that nobody used is missing.
type saved map[string]map[string][]rules.Rule

func parse(text string) saved {
	s := make(saved)
	var table map[string][]rules.Rule
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || strings.HasPrefix(line, "#"):
		case line[0] == '*':
			table = make(map[string][]rules.Rule)
			s[words[0][1:]] = table
		case table == nil:
		case line[0] == ':':
			table[words[0][1:]] = nil
		case words[0] == "-A" && len(words) > 2:
			table[words[1]] = append(table[words[1]], words[2:])
		}
	}
	return s
}

func (s saved) has(table, chain string) bool {
	_, ok := s[table][chain]
	return ok
}

// holds reports whether the chain has the rules it should, in order.
func (s saved) holds(c rules.Chain) bool {
	return slices.EqualFunc(s[c.Table][c.Name], c.Rules, rules.Same)
}

// positions returns where, from 1, rules jump to target without a condition.
func positions(have []rules.Rule, target string) []int {
	var at []int
	for i, r := range have {
		if slices.Equal(r, rules.Rule{"-j", target}) {
			at = append(at, i+1)
		}
	}
	return at
}
