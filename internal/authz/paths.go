package authz

import (
	"maps"
	"slices"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// paths finds policies by how the paths begin that they are about. A request is compared only with those whose beginning its
// path has.
type paths struct {
	all    []int32   // every policy that is listed, for what has no path
	starts []string  // sorted
	on     [][]int32 // the policies of each start
	parent []int32   // the longest other start that it begins with; -1: none
}

// indexPaths lists the policies of each start. In sorted order, what begins with a start follows it without a gap, so the stack of
// starts that are still open holds the parents.
func indexPaths(all []int32, byStart map[string][]int32) paths {
	p := paths{all: all, starts: slices.Sorted(maps.Keys(byStart))}
	var open []int32
	for i, s := range p.starts {
		for len(open) > 0 && !strings.HasPrefix(s, p.starts[open[len(open)-1]]) {
			open = open[:len(open)-1]
		}
		parent := int32(-1)
		if len(open) > 0 {
			parent = open[len(open)-1]
		}
		p.on, p.parent = append(p.on, byStart[s]), append(p.parent, parent)
		open = append(open, int32(i))
	}
	return p
}

// longest returns the longest start that path begins with; -1: none. Its parents are all the others: whatever is between a start of
// path and path itself, in sorted order, begins with that start.
func (p *paths) longest(path string) int32 {
	at, there := slices.BinarySearch(p.starts, path)
	if there {
		return int32(at)
	}
	i := int32(at) - 1
	for i >= 0 && !strings.HasPrefix(path, p.starts[i]) {
		i = p.parent[i]
	}
	return i
}

// startsOf lists how a path must begin for p to match. ok is false when it may match any.
func startsOf(p *policy) (starts []string, ok bool) {
	if p.invalid {
		return nil, false
	}
	for _, g := range p.groups {
		i := slices.IndexFunc(g, func(cl clause) bool { _, ok := startsOfClause(cl); return ok })
		if i < 0 {
			return nil, false
		}
		of, _ := startsOfClause(g[i]) // since all clauses must match, one is enough
		starts = append(starts, of...)
	}
	return starts, true
}

func startsOfClause(cl clause) (starts []string, ok bool) {
	for i := range cl {
		o := cl[i].only.Operation
		if o == nil || len(o.Paths) == 0 {
			return nil, false
		}
		for _, m := range o.Paths {
			switch m.Kind {
			case mesh.MatchExact, mesh.MatchPrefix:
				starts = append(starts, m.Value)
			case mesh.MatchTemplate:
				start, _, _ := strings.Cut(m.Value, "{")
				starts = append(starts, start)
			case mesh.MatchSuffix, mesh.MatchPresence:
				return nil, false
			case mesh.MatchNever:
			}
		}
	}
	return starts, len(cl) > 0
}
