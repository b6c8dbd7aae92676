package mesh

import (
	"hash/maphash"
	"iter"
	"maps"
)

// shards is how many parts a table is split into. A change copies only the parts it touches: with 100 000 entries that
// is some 400 of them instead of all.
const shards = 256

// seed only spreads keys over shards: no result depends on it.
var seed = maphash.MakeSeed()

// table is an immutable map. The zero value is empty.
type table[K comparable, V any] struct {
	parts [shards]map[K]V
	n     int
}

func shardOf[K comparable](k K) uint8 { return uint8(maphash.Comparable(seed, k)) }

func (t *table[K, V]) get(k K) (V, bool) {
	v, ok := t.parts[shardOf(k)][k]
	return v, ok
}

func (t *table[K, V]) len() int { return t.n }

func (t *table[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, part := range t.parts {
			for k, v := range part {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// edit starts a change of t. t itself is never touched.
func (t *table[K, V]) edit() *tableEdit[K, V] { return &tableEdit[K, V]{table: *t} }

// tableEdit is a table being changed: each part is copied the first time it is written.
type tableEdit[K comparable, V any] struct {
	table[K, V]
	owned [shards]bool
}

func (e *tableEdit[K, V]) part(k K) map[K]V {
	i := shardOf(k)
	if !e.owned[i] {
		e.owned[i] = true
		e.parts[i] = maps.Clone(e.parts[i])
		if e.parts[i] == nil {
			e.parts[i] = make(map[K]V)
		}
	}
	return e.parts[i]
}

func (e *tableEdit[K, V]) set(k K, v V) {
	part := e.part(k)
	before := len(part)
	part[k] = v
	e.n += len(part) - before
}

func (e *tableEdit[K, V]) delete(k K) {
	if _, ok := e.get(k); !ok {
		return
	}
	delete(e.part(k), k)
	e.n--
}
