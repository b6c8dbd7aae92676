package hbone

import (
	"golang.org/x/net/http2"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

const (
	maxStaged   = 64 << 10       // DATA staged while somebody else writes; more waits in the queue
	maxOwed     = 4 << 20        // staged bytes of any kind; a peer that makes us owe it more is misbehaving
	stageLimit  = 8 << 10        // messages up to this size are copied rather than queued
	batchLimit  = 4 * (64 << 10) // plaintext encrypted for one flush
	extraRounds = 4              // what a stream's goroutine writes for others before it hands over
)

// writer is the sending half of a connection, guarded by conn.mu. There is no writer goroutine: whoever has something to
// send appends it, and if nobody is writing becomes the one who encrypts everything pending and flushes it in one system
// call. While it does, others append to the next batch.
//
// Pending work is of two kinds. Control frames and small messages are staged as ready-made frames and go first, so that
// a short exchange never waits behind bulk. Large writes queue as their stream, whose goroutine waits, and are served
// round robin, one frame of at most 64 KB each.
type writer struct {
	busy      bool // somebody is encrypting or flushing
	staged    []byte
	spare     []byte    // the other staging buffer
	window    int       // the connection's send window
	queue     []*Stream // streams with out and window, in turn
	head      int
	chunks    []chunk      // of the batch being written; only whoever is busy uses it
	header    []byte       // of the frame being encrypted; likewise
	update    record.Owed  // a key update to be sent
	failAfter error        // end the connection after the next flush
	lastWord  record.Alert // what ends that flush
}

// chunk is one DATA frame being encrypted. Its bytes belong to the goroutine waiting in Stream.Write.
type chunk struct {
	s *Stream
	p []byte
}

func (w *writer) enqueue(s *Stream) {
	if s.queued {
		return
	}
	s.queued = true
	if w.head > 0 && len(w.queue) == cap(w.queue) {
		w.queue = w.queue[:copy(w.queue, w.queue[w.head:])]
		w.head = 0
	}
	w.queue = append(w.queue, s)
}

func (w *writer) dequeue() *Stream {
	if w.head == len(w.queue) {
		return nil
	}
	s := w.queue[w.head]
	w.queue[w.head] = nil
	if w.head++; w.head == len(w.queue) {
		w.queue, w.head = w.queue[:0], 0
	}
	s.queued = false
	return s
}

func (w *writer) pending() bool {
	return len(w.staged) > 0 || w.failAfter != nil || w.update != record.Nothing || w.window > 0 && w.head < len(w.queue)
}

// send makes sure what is staged goes out. It is called with c.mu held and releases it. With block false the caller's
// goroutine never waits for the socket.
func (c *conn) send(block bool) {
	if c.w.busy || !c.w.pending() || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.w.busy = true
	c.mu.Unlock()
	c.drive(nil, block)
}

// kickLocked makes sure what is pending goes out, on another goroutine. For callers that must keep c.mu.
func (c *conn) kickLocked() {
	if c.w.busy || !c.w.pending() || c.err != nil {
		return
	}
	c.w.busy = true
	c.driveElsewhere()
}

// driveElsewhere passes the writer's role to a goroutine of the connection. It is called with c.mu held and the
// connection alive, so that whoever ends the connection and then waits for its goroutines waits for this one too.
func (c *conn) driveElsewhere() {
	c.handlers.Go(func() { c.drive(nil, true) })
}

// drive encrypts and writes until nothing is pending. The caller has set w.busy; drive clears it, or passes it on to
// another goroutine. owner is the stream whose goroutine this is, or nil.
func (c *conn) drive(owner *Stream, block bool) {
	for round := 0; ; round++ {
		c.mu.Lock()
		if c.err != nil || !c.w.pending() {
			c.stopLocked()
			c.mu.Unlock()
			return
		}
		if !block && c.w.head < len(c.w.queue) || owner != nil && len(owner.out) == 0 && round >= extraRounds {
			c.driveElsewhere()
			c.mu.Unlock()
			return
		}
		staged := c.collectLocked()
		update, failAfter, lastWord := c.w.update, c.w.failAfter, c.w.lastWord
		c.w.update = record.Nothing
		c.mu.Unlock()

		err := c.encrypt(staged, update)
		if err == nil && failAfter != nil {
			err = c.rec.alert(lastWord)
		}
		c.releaseChunks(staged)
		if err == nil {
			var done bool
			if done, err = c.bc.flush(block); err == nil && !done {
				c.driveElsewhereFlushing()
				return
			}
		}
		if err == nil {
			err = failAfter
		}
		if err != nil {
			c.stopAndFail(err)
			return
		}
	}
}

// driveElsewhereFlushing goes on with a flush that would have blocked.
func (c *conn) driveElsewhereFlushing() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		c.stopLocked()
		return
	}
	c.handlers.Go(func() {
		if _, err := c.bc.flush(true); err != nil {
			c.stopAndFail(err)
			return
		}
		c.drive(nil, true)
	})
}

// stopLocked gives up the writer's role and the memory that goes with it. When the connection is over nobody takes the
// role again.
func (c *conn) stopLocked() {
	c.w.busy = false
	c.rec.idle()
	if c.err != nil {
		c.stopWritingLocked()
	}
}

// stopWritingLocked forgets what was to be written, and by which secrets. Nobody writes any more.
func (c *conn) stopWritingLocked() {
	c.rec.stopWriting()
	c.bc.stopWriting()
}

// stopAndFail ends the connection because of its writer.
func (c *conn) stopAndFail(err error) {
	c.mu.Lock()
	c.stopLocked()
	c.mu.Unlock()
	c.fail(err)
}

// collectLocked takes the next batch: what is staged, and frames of queued streams in turn.
func (c *conn) collectLocked() (staged []byte) {
	w := &c.w
	staged, w.staged, w.spare = w.staged, w.spare[:0], nil
	room := batchLimit - len(staged)
	for room > 0 && w.window > 0 {
		s := w.dequeue()
		if s == nil {
			break
		}
		limit := min(bulkPayload, c.peerMaxFrame)
		if limit < bulkPayload {
			limit = min(limit, recordPayload)
		}
		n := min(len(s.out), limit, s.sendWindow, w.window)
		if n <= 0 {
			continue // a WINDOW_UPDATE queues it again
		}
		w.chunks = append(w.chunks, chunk{s, s.out[:n]})
		s.out = s.out[n:]
		s.inFlight++
		s.sendWindow -= n
		w.window -= n
		room -= n + frameHeaderBytes
		if len(s.out) > 0 && s.sendWindow > 0 {
			w.enqueue(s)
		}
	}
	return staged
}

// encrypt turns a batch into records. The staged frames and the first bytes of a large frame share no record, but a
// frame of recordPayload or bulkPayload bytes fills whole records.
func (c *conn) encrypt(staged []byte, update record.Owed) error {
	w := &c.w
	if update != record.Nothing {
		if err := c.rec.update(update); err != nil {
			return err
		}
	}
	if err := c.rec.seal(staged, nil); err != nil {
		return err
	}
	for _, ch := range w.chunks {
		w.header = appendFrameHeader(w.header[:0], len(ch.p), http2.FrameData, 0, ch.s.id)
		if err := c.rec.seal(w.header, ch.p); err != nil {
			return err
		}
	}
	return nil
}

// releaseChunks gives the encrypted bytes back to their writers, before the flush: they may read on meanwhile.
func (c *conn) releaseChunks(staged []byte) {
	w := &c.w
	c.mu.Lock()
	if w.spare == nil {
		w.spare = staged[:0]
	}
	for i, ch := range w.chunks {
		ch.s.inFlight--
		if ch.s.inFlight == 0 && len(ch.s.out) == 0 {
			ch.s.wakeWriter()
		}
		w.chunks[i] = chunk{}
	}
	w.chunks = w.chunks[:0]
	c.mu.Unlock()
}
