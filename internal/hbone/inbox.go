package hbone

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mistnet/mistnet/internal/memlimit"
)

// inbox is the receiving half of a stream: what arrived and was not taken yet, and who takes it.
type inbox struct {
	mu       sync.Mutex
	parts    []part        // in order
	size     int           // bytes in parts
	buffered *atomic.Int64 // the same, of all streams of the connection
	mem      *memlimit.Account
	slabs    int   // bytes of the slabs of parts, as charged to mem
	age      int   // calls of Age since something was taken
	window   int   // what the peer may still send
	unacked  int   // taken and not yet returned to the peer
	end      bool  // nothing more arrives
	err      error // why, when not by END_STREAM
	readBy   time.Time
	status   int    // client: of the answer
	notify   func() // called once, when there is something to read; nil: nobody asked

	sink     Sink
	draining bool // a goroutine writes parts to sink
	finished bool // sink.Done was called
}

// part is a slab of which b[r:w] is unread.
type part struct {
	b    []byte
	r, w int
}

// Sink takes what a stream receives. TryWrite is called on the connection's reader goroutine and must not block: it
// returns how much it took. Write may block and is called on a goroutine of the stream. Done is called once, last: with
// nil after the peer's END_STREAM and everything before it, else with why no more comes.
type Sink = interface {
	TryWrite(p []byte) (int, error)
	Write(p []byte) (int, error)
	Done(err error)
}

// Receive hands everything the stream receives to the sink, instead of Read. It returns at once.
func (s *Stream) Receive(to Sink) {
	in := &s.in
	in.mu.Lock()
	in.sink = to
	if in.size > 0 && in.err == nil {
		in.draining = true
		in.mu.Unlock()
		go s.drainToSink() // ends with the bytes buffered, or when the sink fails, which Reset and Close cause
		return
	}
	in.finishIfOver()
}

// finishIfOver calls Done if the stream is over and everything was taken. It is called with in.mu held and releases it.
func (in *inbox) finishIfOver() {
	if in.finished && !in.draining {
		in.dropParts()
	}
	if in.sink == nil || in.finished || !in.end || in.err == nil && in.size > 0 {
		in.mu.Unlock()
		return
	}
	in.finished = true
	err := in.err
	if err == io.EOF {
		err = nil
	}
	in.dropParts()
	in.mu.Unlock()
	in.sink.Done(err)
}

func (in *inbox) dropParts() {
	if in.draining {
		return // its goroutine still writes from them
	}
	for i := range in.parts {
		putBuffered(in.parts[i].b)
		in.parts[i] = part{}
	}
	in.parts = nil
	in.mem.Release(in.slabs)
	in.slabs = 0
	in.addSize(-in.size)
}

func (in *inbox) addSize(n int) {
	in.size += n
	in.buffered.Add(int64(n))
}

// receive takes payload from the reader goroutine: straight to the sink when it can, else to the buffer.
func (s *Stream) receive(p []byte) {
	in := &s.in
	in.mu.Lock()
	if in.end {
		in.mu.Unlock()
		return
	}
	if in.sink != nil && in.size == 0 && !in.draining {
		sink := in.sink
		in.mu.Unlock() // only this goroutine adds to the buffer, so it stays empty
		n, err := sink.TryWrite(p)
		if err != nil {
			s.sinkFailed(err)
			return
		}
		in.mu.Lock()
		credit := in.takeLocked(n)
		p = p[n:]
		if len(p) == 0 {
			in.mu.Unlock()
			s.credit(credit)
			return
		}
		in.push(p)
		in.draining = true
		in.mu.Unlock()
		s.credit(credit)
		go s.drainToSink()
		return
	}
	in.push(p)
	f := in.takeNotify()
	in.mu.Unlock()
	s.wakeReader()
	f()
}

// Notify has f called once, when there is something to read or nothing more will come: at once, if that is so already. Of several
// calls before then the last counts. f must not block: it is called on the connection's reader goroutine, or any other. So a stream
// can be waited for without a goroutine.
func (s *Stream) Notify(f func()) {
	in := &s.in
	in.mu.Lock()
	in.notify = f
	if in.size == 0 && !in.end {
		in.mu.Unlock()
		return
	}
	f = in.takeNotify()
	in.mu.Unlock()
	f()
}

// takeNotify returns what is to be called without locks.
func (in *inbox) takeNotify() func() {
	f := in.notify
	in.notify = nil
	if f == nil {
		return func() {}
	}
	return f
}

func (in *inbox) push(p []byte) {
	in.addSize(len(p))
	for len(p) > 0 {
		last := len(in.parts) - 1
		if last < 0 || in.parts[last].w == len(in.parts[last].b) {
			b := largeSlabs.Get
			if last < 0 && len(p) <= smallBytes {
				b = smallSlabs.Get
			}
			in.parts = append(in.parts, part{b: b()})
			last++
			in.slabs += cap(in.parts[last].b)
			in.mem.Charge(cap(in.parts[last].b))
		}
		t := &in.parts[last]
		n := copy(t.b[t.w:], p)
		t.w += n
		p = p[n:]
	}
}

// takeLocked counts n bytes as taken and returns how much of the window is to be returned to the peer, if it is time.
func (in *inbox) takeLocked(n int) (credit int) {
	in.age = 0
	in.unacked += n
	if in.unacked < recvStreamWindow/2 || in.end {
		return 0
	}
	credit, in.unacked = in.unacked, 0
	in.window += credit
	return credit
}

// read is Stream.Read without the waiting: n == 0 and no error mean that nothing is there.
func (in *inbox) read(p []byte) (n, credit int, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.readBy.IsZero() && !time.Now().Before(in.readBy) {
		return 0, 0, os.ErrDeadlineExceeded
	}
	for n < len(p) && len(in.parts) > 0 {
		t := &in.parts[0]
		k := copy(p[n:], t.b[t.r:t.w])
		t.r += k
		n += k
		if t.r == t.w {
			in.shift()
		}
	}
	in.addSize(-n)
	if n > 0 {
		return n, in.takeLocked(n), nil
	}
	if in.end {
		if in.err == nil {
			return 0, 0, io.EOF
		}
		return 0, 0, in.err
	}
	return 0, 0, nil
}

// shift drops the first part.
func (in *inbox) shift() {
	n := cap(in.parts[0].b)
	in.slabs -= n
	in.mem.Release(n)
	putBuffered(in.parts[0].b)
	k := copy(in.parts, in.parts[1:])
	in.parts[k] = part{}
	in.parts = in.parts[:k]
}

// drainToSink writes what is buffered to the sink, waiting where the reader goroutine must not.
func (s *Stream) drainToSink() {
	in := &s.in
	for {
		in.mu.Lock()
		if in.finished || len(in.parts) == 0 {
			in.draining = false
			in.finishIfOver()
			return
		}
		t := in.parts[0]
		in.mu.Unlock()
		// The reader goroutine may append to this part's slab meanwhile, but only behind t.w.
		n, err := in.sink.Write(t.b[t.r:t.w])
		in.mu.Lock()
		in.addSize(-n)
		p := &in.parts[0]
		if p.r += n; p.r == p.w {
			in.shift()
		}
		credit := in.takeLocked(n)
		in.mu.Unlock()
		s.credit(credit)
		if err != nil {
			in.mu.Lock()
			in.draining = false
			in.mu.Unlock()
			s.sinkFailed(err)
			return
		}
	}
}

// sinkFailed stops receiving for an application connection that takes no more. What it had sent before may still be on
// its way to the peer, so the stream's other half is left to its owner, whom Done tells.
func (s *Stream) sinkFailed(err error) {
	in := &s.in
	in.mu.Lock()
	if !in.end || in.err == nil {
		in.end, in.err = true, err
	}
	in.finishIfOver()
	s.credit(0)
}

// endReceive ends the receiving half because of the peer or the connection: with nil or io.EOF when the peer ended it,
// else with an error. What arrived before an end is still delivered; an error overtakes it, as a TCP reset does.
func (s *Stream) endReceive(err error) {
	in := &s.in
	in.mu.Lock()
	if !in.end {
		in.end = true
		if err != nil && err != io.EOF {
			in.err = err
			in.dropParts()
		}
	}
	f := in.takeNotify()
	s.wakeReader()
	in.finishIfOver()
	if err != nil && err != io.EOF {
		s.credit(0)
	}
	f()
}

// closeReceive ends the receiving half because its owner wants nothing more of it.
func (s *Stream) closeReceive(err error) {
	in := &s.in
	in.mu.Lock()
	if !in.end || in.size > 0 {
		in.end = true
		if in.err == nil {
			in.err = err
		}
		in.dropParts()
	}
	f := in.takeNotify()
	s.wakeReader()
	in.finishIfOver()
	s.credit(0)
	f()
}
