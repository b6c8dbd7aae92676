package route

import (
	"math"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// index finds the entries whose path may match without looking at the others: exact paths by hash, prefixes in a radix
// tree, regexes in the same tree under the literal they begin with. A path that ignores case is in the folded half.
// Lists of positions ascend, so the first that matches of each list is its best, and no list is read beyond the best of
// those before.
type index struct {
	exact      map[string][]int32
	prefix     node
	foldExact  map[string][]int32 // by the folded path
	foldPrefix node
	foldLong   int // length of the longest key of foldExact
}

// noMatch is greater than every position.
const noMatch = math.MaxInt32

func (x *index) add(pos int, p *path) {
	n := int32(pos)
	switch {
	case p.kind == mesh.PathExact && p.fold:
		if x.foldExact == nil {
			x.foldExact = make(map[string][]int32)
		}
		x.foldExact[p.value] = append(x.foldExact[p.value], n)
		x.foldLong = max(x.foldLong, len(p.value))
	case p.kind == mesh.PathExact:
		if x.exact == nil {
			x.exact = make(map[string][]int32)
		}
		x.exact[p.value] = append(x.exact[p.value], n)
	case p.fold:
		x.foldPrefix.add(p.value, n)
	case p.kind == mesh.PathRegex:
		x.prefix.add(p.literal, n)
	default:
		x.prefix.add(p.value, n)
	}
}

// first returns the position of the first entry that matches, or -1.
func (x *index) first(entries []entry, r *Request) int {
	best := int32(noMatch)
	if x.exact != nil {
		best = firstOf(entries, x.exact[r.Path], best, r)
	}
	best = x.prefix.first(entries, best, r)
	if x.foldExact != nil && len(r.Path) <= x.foldLong {
		var buf [256]byte
		best = firstOf(entries, x.foldExact[string(fold(buf[:0], r.Path))], best, r)
	}
	best = x.foldPrefix.firstFolded(entries, best, r)
	if best == noMatch {
		return -1
	}
	return int(best)
}

// firstOf returns the first of positions that matches, or best when none before best does.
func firstOf(entries []entry, positions []int32, best int32, r *Request) int32 {
	for _, i := range positions {
		if i >= best {
			break
		}
		if entries[i].cond.match(r) {
			return i
		}
	}
	return best
}

// fold appends s in lower case (ASCII). The buffer is the caller's and short paths are folded in it; longer ones cost
// an allocation, which only exact paths that ignore case and are as long can cause.
func fold(buf []byte, s string) []byte {
	for i := range len(s) {
		buf = append(buf, lower(s[i]))
	}
	return buf
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// node is a node of a radix tree: the entries whose prefix ends here, and what may follow.
type node struct {
	label     string // the bytes between the parent and here
	positions []int32
	heads     string // the first byte of each child's label, in the order of children
	children  []*node
}

func (n *node) add(key string, pos int32) {
	for {
		if key == "" {
			n.positions = append(n.positions, pos)
			return
		}
		i := strings.IndexByte(n.heads, key[0])
		if i < 0 {
			n.heads += key[:1]
			n.children = append(n.children, &node{label: key, positions: []int32{pos}})
			return
		}
		child := n.children[i]
		same := commonPrefix(child.label, key)
		if same < len(child.label) { // split
			upper := &node{label: child.label[:same], heads: child.label[same : same+1], children: []*node{child}}
			child.label = child.label[same:]
			n.children[i] = upper
			child = upper
		}
		n, key = child, key[same:]
	}
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// child returns where key leads to, or nil.
func (n *node) child(key string) *node {
	i := strings.IndexByte(n.heads, key[0])
	if i < 0 || !strings.HasPrefix(key, n.children[i].label) {
		return nil
	}
	return n.children[i]
}

// first walks down along the path of r.
func (n *node) first(entries []entry, best int32, r *Request) int32 {
	rest := r.Path
	for {
		best = firstOf(entries, n.positions, best, r)
		if rest == "" {
			return best
		}
		if n = n.child(rest); n == nil {
			return best
		}
		rest = rest[len(n.label):]
	}
}

// firstFolded is first for a tree of folded prefixes.
func (n *node) firstFolded(entries []entry, best int32, r *Request) int32 {
	rest := r.Path
	for {
		best = firstOf(entries, n.positions, best, r)
		if rest == "" {
			return best
		}
		i := strings.IndexByte(n.heads, lower(rest[0]))
		if i < 0 || !hasFoldedPrefix(rest, n.children[i].label) {
			return best
		}
		n = n.children[i]
		rest = rest[len(n.label):]
	}
}

// hasFoldedPrefix reports whether s begins with prefix, which is in lower case, whatever the case of s.
func hasFoldedPrefix(s, prefix string) bool {
	if len(s) < len(prefix) {
		return false
	}
	for i := range len(prefix) {
		if lower(s[i]) != prefix[i] {
			return false
		}
	}
	return true
}
