// Package slab keeps large byte slices for reuse. It hides when memory is taken from the heap, and does nothing else.
package slab

import "sync"

// List keeps slices of one size. Unlike sync.Pool it has a cap and survives garbage collection, and it hands out the
// most recently returned slice first, which is the one still in the processor's cache. Its methods may be called from
// several goroutines. Make it with New.
type List struct {
	size int // bytes of each slice
	keep int // slices kept at most

	mu   sync.Mutex
	free [][]byte
}

// New returns an empty list of slices of size bytes, of which it keeps at most keep.
func New(size, keep int) *List { return &List{size: size, keep: keep} }

// Get returns a slice of the list's size, with whatever is in it.
func (l *List) Get() []byte {
	l.mu.Lock()
	n := len(l.free)
	if n == 0 {
		l.mu.Unlock()
		return make([]byte, l.size)
	}
	b := l.free[n-1]
	l.free[n-1] = nil
	l.free = l.free[:n-1]
	l.mu.Unlock()
	return b
}

// Put takes b back. The caller must not touch it again. Slices of another capacity are left to the collector.
func (l *List) Put(b []byte) {
	if cap(b) != l.size {
		return
	}
	l.mu.Lock()
	if len(l.free) < l.keep {
		l.free = append(l.free, b[:l.size])
	}
	l.mu.Unlock()
}
