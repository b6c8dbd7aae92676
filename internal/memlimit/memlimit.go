// Package memlimit bounds what all connections of a program together hold in memory.
//
// There is one [Budget]. Each connection has an [Account] of it, to which it charges what it has received and nobody has taken
// yet; what does not grow with that (buffers on their way through, the memory of a connection or a stream itself) is charged to the
// Budget at once. Charging is two atomic additions: no lock, no allocation, no clock.
//
// Flow control does the work. Before a connection reopens its window it asks [Account.Window] how large it may be: what the
// connection holds and may still be sent together get no more than an eighth of what is free at that moment. So who holds
// little always has room, however many others hold as much as they may, and nobody loses data: who gets no window waits. What
// is promised to a peer cannot be taken back, so a connection begins with a small window, and gets a large one when it uses it.
//
// That leaves windows that many connections have had for long and use all at once. So, in this order:
//
//	above 3/4 of the limit   streams of which nothing was taken for ten seconds are ended, those that hold most first
//	above 7/8                no new connections are taken
//	above the limit          no new streams are taken, and streams are ended at once: those of which nothing was taken for
//	                         long first, then those that hold most
//
// [Budget.Run] does the ending, and says so. The package does not know what a connection is: see [Holder].
package memlimit

import (
	"sync"
	"sync/atomic"
)

const (
	// share is which part of what is free one connection may hold: with an eighth one alone gets a ninth of all, and a dozen that take
	// what they can get leave a quarter.
	share = 8
	// leastWindow is what a peer may send however short memory is, if its connection holds less than the floor.
	leastWindow = 64 << 10
	// FirstWindow is the most that a connection should let its peer send before it knows whether it sends much at all.
	FirstWindow = 256 << 10
)

// Budget is what may be held. A nil Budget has no bound and counts nothing.
type Budget struct {
	limit int64
	floor int64 // what a connection may hold however short memory is
	held  atomic.Int64
	over  chan struct{} // says that the limit was exceeded

	refused atomic.Uint64
	ended   atomic.Uint64

	mu       sync.Mutex
	accounts map[*Account]struct{}
}

// New returns a budget of limit bytes.
func New(limit int64) *Budget {
	return &Budget{
		limit: limit, floor: min(max(limit/512, 2*leastWindow), 1<<20),
		over: make(chan struct{}, 1), accounts: make(map[*Account]struct{}),
	}
}

// Charge counts n bytes as held. It never fails: who asks Window and Full before does not get far above the limit.
func (b *Budget) Charge(n int) {
	if b == nil {
		return
	}
	if b.held.Add(int64(n)) > b.limit {
		select {
		case b.over <- struct{}{}:
		default: // it is known
		}
	}
}

// Release takes back what Charge counted.
func (b *Budget) Release(n int) {
	if b != nil {
		b.held.Add(-int64(n))
	}
}

// Full reports that the limit is exceeded: nothing new should be begun.
func (b *Budget) Full() bool { return b != nil && b.held.Load() > b.limit }

// Admit charges n bytes for a new connection, which Release takes back. False: memory is too short for new connections; nothing was
// charged, and the refusal was counted.
func (b *Budget) Admit(n int) bool {
	if b != nil && b.held.Load() > b.limit-b.limit/8 {
		b.refused.Add(1)
		return false
	}
	b.Charge(n)
	return true
}

// Limit is how many bytes may be held; zero: any number.
func (b *Budget) Limit() int64 {
	if b == nil {
		return 0
	}
	return b.limit
}

// Held is how many bytes are held now.
func (b *Budget) Held() int64 {
	if b == nil {
		return 0
	}
	return b.held.Load()
}

// Refused is how many connections were refused.
func (b *Budget) Refused() uint64 {
	if b == nil {
		return 0
	}
	return b.refused.Load()
}

// Ended is how many streams were ended because memory was short.
func (b *Budget) Ended() uint64 {
	if b == nil {
		return 0
	}
	return b.ended.Load()
}

// Account is what one connection holds. A nil Account has no bound and counts nothing.
type Account struct {
	budget *Budget
	holder Holder
	held   atomic.Int64
}

// Open returns an account for a connection. It is to be closed.
func (b *Budget) Open(h Holder) *Account {
	if b == nil {
		return nil
	}
	a := &Account{budget: b, holder: h}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.accounts[a] = struct{}{}
	return a
}

// Close ends the account: the connection is over, and Run asks it for nothing more. What it still holds stays charged until it is
// released.
func (a *Account) Close() {
	if a == nil {
		return
	}
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	delete(a.budget.accounts, a)
}

// Charge counts n bytes that came for the connection and wait to be taken.
func (a *Account) Charge(n int) {
	if a == nil {
		return
	}
	a.held.Add(int64(n))
	a.budget.Charge(n)
}

// Release takes back what Charge counted.
func (a *Account) Release(n int) {
	if a == nil {
		return
	}
	a.held.Add(-int64(n))
	a.budget.Release(n)
}

// Window is how many bytes the peer may be allowed to send from now on, of the most that it would be allowed if memory were no
// question. Zero: none, until the connection holds less. A connection that holds little always gets something.
func (a *Account) Window(most int) int {
	if a == nil {
		return most
	}
	b := a.budget
	held := a.held.Load()
	room := (b.limit-b.held.Load())/share - held
	switch {
	case room >= int64(most):
		return most
	case room >= leastWindow:
		return int(room)
	case held < b.floor:
		return min(leastWindow, most)
	}
	return 0
}
