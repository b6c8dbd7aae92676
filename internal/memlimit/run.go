package memlimit

import (
	"cmp"
	"context"
	"net"
	"slices"
	"time"

	"go.uber.org/zap"
)

// Holder is a connection with streams, as Run sees it. Its methods must not wait for the peer.
type Holder interface {
	// Age notes of every stream whether something of it was taken since the last time.
	Age()
	// Shed ends streams that hold something and of which nothing was taken for so many calls of Age, those that hold most first,
	// until n bytes are let go or there is no such stream. It returns how many streams that were, and what they held.
	Shed(n int64, ages int) (streams int, bytes int64)
	// RemoteAddr names the peer.
	RemoteAddr() net.Addr
}

const (
	ageInterval   = time.Second
	patience      = 10 // ages that a stream may hold something while memory is short
	settle        = 5 * time.Millisecond
	reportEvery   = 10 * time.Second
	shedPart      = 4 // streams are ended until a part of the limit is free
	lateAges      = 1
	roundsOfAWake = 20
)

// Run ends streams when memory is short, until ctx is done, and tells log what it had to do.
func (b *Budget) Run(ctx context.Context, log *zap.Logger) {
	clock := time.NewTicker(ageInterval)
	defer clock.Stop()
	r := report{log: log}
	for {
		select {
		case <-ctx.Done():
			return
		case <-clock.C:
			if b.target() > 0 {
				all := b.holders()
				for _, a := range all {
					a.holder.Age()
				}
				b.shed(all, &r, patience, b.target())
			}
		case <-b.over:
			b.relieve(ctx, &r)
		}
		r.write(b)
	}
}

// target is how much must go.
func (b *Budget) target() int64 { return b.held.Load() - (b.limit - b.limit/shedPart) }

// relieve ends streams until the limit is no more exceeded. What streams held may be in the hands of goroutines that must first see
// their end.
func (b *Budget) relieve(ctx context.Context, r *report) {
	for range roundsOfAWake {
		if !b.Full() {
			return
		}
		all, need := b.holders(), b.target()
		for _, ages := range [...]int{patience, lateAges, 0} {
			need = b.shed(all, r, ages, need)
		}
		t := time.NewTimer(settle)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// holders are the accounts that hold something, those that hold most first.
func (b *Budget) holders() []*Account {
	type entry struct {
		a    *Account
		held int64
	}
	var all []entry
	b.mu.Lock()
	for a := range b.accounts {
		if n := a.held.Load(); n > 0 {
			all = append(all, entry{a, n})
		}
	}
	b.mu.Unlock()
	slices.SortFunc(all, func(x, y entry) int { return cmp.Compare(y.held, x.held) })
	out := make([]*Account, len(all))
	for i, e := range all {
		out[i] = e.a
	}
	return out
}

// shed ends streams of that age until they held as much as is needed, and returns what is missing.
func (b *Budget) shed(all []*Account, r *report, ages int, need int64) int64 {
	for _, a := range all {
		if need <= 0 {
			break
		}
		streams, bytes := a.holder.Shed(need, ages)
		if streams == 0 {
			continue
		}
		need -= bytes
		b.ended.Add(uint64(streams))
		r.add(a.holder, streams, bytes)
	}
	return need
}

// report gathers what is to be said: a line at once, then one for all that comes within reportEvery.
type report struct {
	log     *zap.Logger
	last    time.Time
	streams int
	bytes   int64
	most    int64    // that one connection's streams held
	peer    net.Addr // its peer
	refused uint64   // as told
}

func (r *report) add(h Holder, streams int, bytes int64) {
	r.streams += streams
	r.bytes += bytes
	if bytes >= r.most {
		r.most, r.peer = bytes, h.RemoteAddr()
	}
}

func (r *report) write(b *Budget) {
	refused := b.refused.Load()
	if r.streams == 0 && refused == r.refused || time.Since(r.last) < reportEvery {
		return
	}
	fields := []zap.Field{
		zap.Int64("held.bytes", b.held.Load()), zap.Int64("limit.bytes", b.limit),
		zap.Int("streams.ended", r.streams), zap.Int64("streams.bytes", r.bytes), zap.Uint64("connections.refused", refused-r.refused),
	}
	if r.peer != nil {
		fields = append(fields, zap.Stringer("peer.addr", r.peer), zap.Int64("peer.bytes", r.most))
	}
	r.log.Warn("memory for connections is short: what nobody reads was ended", fields...)
	*r = report{log: r.log, last: time.Now(), refused: refused}
}
