// Package parking keeps connections that wait for their peer: without a goroutine, its stack, a timer or a buffer for each. Most of
// the connections a proxy has wait at any time, and what they hold is most of its memory.
//
// It hides how it is noticed that there is something to read: one goroutine waits for all TCP connections by epoll, a tunnel's
// stream tells by itself. It knows nothing of HTTP, and reads and writes nothing.
package parking

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mistnet/mistnet/internal/linux"
)

// Guest is what waits: a connection with what is known of it. Exactly one of its methods is called, once for each time it was
// parked.
type Guest interface {
	// Resume is called on a goroutine of its own when there is something to read, or nothing more will come. It may take as long as
	// it likes, and may park the guest again as the last thing it does.
	Resume()
	// Expire is called instead when the guest has waited for too long, or nobody may wait any more. It must not block.
	Expire()
}

// notifier is a connection that tells by itself when it can be read: f is called once, on any goroutine, and must not block.
type notifier interface{ Notify(f func()) }

const (
	spareWorkers = 32               // that wait for the next guest with their stacks grown already
	lookInterval = 10 * time.Second // for guests that have waited too long
)

// Lot is where connections wait. Make it with New.
type Lot struct {
	set   *linux.ReadSet
	start time.Time
	next  chan Guest // to spare workers
	quit  chan struct{}
	loops sync.WaitGroup // the goroutines of the lot itself
	work  sync.WaitGroup // the workers
	spare atomic.Int32   // those without a guest

	mu     sync.Mutex
	places []place  // by number
	free   []uint32 // numbers of those where nobody waits
	closed bool
}

// place is where one guest waits.
type place struct {
	guest Guest         // nil: nobody
	turn  uint32        // grows with each guest, so that what concerns the last one is not taken for news of this one
	until time.Duration // since start; it may wait
}

// New makes an empty lot, which keeps one goroutine to be told and one to look at the clock. Errors hold their errno.
func New() (*Lot, error) { return newLot(lookInterval) }

func newLot(look time.Duration) (*Lot, error) {
	set, err := linux.NewReadSet()
	if err != nil {
		return nil, err
	}
	l := &Lot{set: set, start: time.Now(), next: make(chan Guest), quit: make(chan struct{})}
	l.loops.Go(l.listen)
	l.loops.Go(func() { l.watchClock(look) })
	return l, nil
}

// Takes reports whether a connection can be parked.
func Takes(conn net.Conn) bool {
	switch conn.(type) {
	case *net.TCPConn, notifier:
		return true
	}
	return false
}

// Park lets g wait until there is something to read from conn, or wait has passed. From when it returns true on, g belongs to the lot:
// it may have been resumed already. False: the lot takes nobody any more, or cannot take this one.
func (l *Lot) Park(g Guest, conn net.Conn, wait time.Duration) bool {
	key, ok := l.enter(g, wait)
	if !ok {
		return false
	}
	switch c := conn.(type) {
	case *net.TCPConn:
		var raw syscall.RawConn
		var err error
		if raw, err = c.SyscallConn(); err == nil {
			err = l.set.Watch(raw, key)
		}
		if err != nil {
			return l.leave(key) == nil // else who took it has it
		}
	case notifier:
		c.Notify(func() { l.wake(key) })
	default:
		return l.leave(key) == nil
	}
	return true
}

// Waiting is how many guests there are.
func (l *Lot) Waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.places) - len(l.free)
}

// Drain makes all that wait expire, and takes nobody any more.
func (l *Lot) Drain() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.expire(func(*place) bool { return true })
}

// Close is Drain, and waits for those that were resumed.
func (l *Lot) Close() error {
	l.Drain()
	close(l.quit)
	err := l.set.Close()
	l.loops.Wait()
	l.work.Wait()
	return err
}

// enter finds a place.
func (l *Lot) enter(g Guest, wait time.Duration) (key uint64, ok bool) {
	until := time.Since(l.start) + wait
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, false
	}
	if len(l.free) == 0 {
		l.free = append(l.free, uint32(len(l.places)))
		l.places = append(l.places, place{})
	}
	n := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	p := &l.places[n]
	p.guest, p.until = g, until
	return uint64(p.turn)<<32 | uint64(n), true
}

// leave empties a place and returns who waited there; nil when somebody else has taken it.
func (l *Lot) leave(key uint64) Guest {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leaveLocked(key)
}

func (l *Lot) leaveLocked(key uint64) Guest {
	n, turn := uint32(key), uint32(key>>32)
	p := &l.places[n]
	if p.turn != turn || p.guest == nil {
		return nil
	}
	g := p.guest
	p.guest = nil
	p.turn++
	l.free = append(l.free, n)
	return g
}

// wake resumes who waits by a key, if it still does.
func (l *Lot) wake(key uint64) {
	l.mu.Lock()
	g := l.leaveLocked(key)
	if g == nil {
		l.mu.Unlock()
		return
	}
	l.work.Add(1) // under the lock: Close waits once nobody is left to be woken
	l.mu.Unlock()
	select {
	case l.next <- g:
		l.work.Done() // its worker is counted
	default:
		go l.serve(g)
	}
}

// serve is a worker: it resumes a guest after the other.
func (l *Lot) serve(g Guest) {
	defer l.work.Done()
	for {
		g.Resume()
		g = nil
		if l.spare.Add(1) > spareWorkers {
			l.spare.Add(-1)
			return
		}
		select {
		case g = <-l.next:
			l.spare.Add(-1)
		case <-l.quit:
			return
		}
	}
}

// listen wakes TCP connections until the lot is closed.
func (l *Lot) listen() {
	var keys []uint64
	var err error
	for {
		if keys, err = l.set.Wait(keys[:0]); err != nil {
			return // closed: a wait for a set that is open fails of nothing else
		}
		for _, key := range keys {
			l.wake(key)
		}
	}
}

// watchClock makes guests expire that have waited too long, until the lot is closed.
func (l *Lot) watchClock(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			now := time.Since(l.start)
			l.expire(func(p *place) bool { return p.until <= now })
		case <-l.quit:
			return
		}
	}
}

// expire makes those expire who are chosen.
func (l *Lot) expire(chosen func(*place) bool) {
	var out []Guest
	l.mu.Lock()
	for n := range l.places {
		if p := &l.places[n]; p.guest != nil && chosen(p) {
			out = append(out, l.leaveLocked(uint64(p.turn)<<32|uint64(n)))
		}
	}
	l.mu.Unlock()
	for _, g := range out {
		g.Expire()
	}
}
