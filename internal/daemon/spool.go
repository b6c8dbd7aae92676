package daemon

import (
	"bytes"
	"io"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	spoolDelay   = 100 * time.Millisecond // how long a line may wait for others, to be written with them
	spoolBatch   = 64 << 10               // so much does not wait: what a pipe takes at once
	spoolLimit   = 2 << 20                // of what waits, while as much may be on its way
	spoolReserve = 64 << 10               // of the limit, for prompt lines only
	spoolKept    = 4 * spoolBatch         // a buffer that grew beyond is let go when it is written
)

// Spool stands between who has a line to write and an output that may stall, as the pipe to a container runtime does: Write
// never waits. One goroutine writes, many lines at a time, as long as there are any. What has no room is dropped and counted.
//
// zapcore.BufferedWriteSyncer would not do: who fills its buffer writes, and who comes then waits for its lock.
type Spool struct {
	out  io.Writer
	tell func(lost uint64) // of lines that are missing at this place; nil: nobody is told

	mu      sync.Mutex
	lines   []byte        // that wait
	prompt  bool          // some of them wait for nothing but the output
	dropped uint64        // behind them
	lost    uint64        // in all
	writing bool          // there is a writer
	idle    sync.Cond     // there is none any more
	wake    chan struct{} // has an element when the writer is not to wait for more lines

	// The writer's, one after the other.
	spare []byte
	timer *time.Timer
	torn  bool // the output ends within a line
}

// NewSpool returns a spool that writes to out. There is nothing to close: without lines it has no goroutine.
func NewSpool(out io.Writer) *Spool {
	s := &Spool{out: out, wake: make(chan struct{}, 1)}
	s.idle.L = &s.mu
	return s
}

// Write takes one line, which is written soon unless the output stalls. It does not wait and does not fail.
func (s *Spool) Write(line []byte) (int, error) {
	s.take(line, spoolLimit-spoolReserve, false)
	return len(line), nil
}

// promptLines writes to a spool what waits for nothing but the output: the last line before a crash says most.
type promptLines struct{ *Spool }

func (s promptLines) Write(line []byte) (int, error) {
	s.take(line, spoolLimit, true)
	return len(line), nil
}

func (s *Spool) take(line []byte, limit int, prompt bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines)+len(line) > limit {
		s.dropped++
		s.lost++
		return
	}
	s.lines = append(s.lines, line...)
	s.start(prompt || len(s.lines) >= spoolBatch)
}

// start makes a writer unless there is one. The caller holds mu.
func (s *Spool) start(prompt bool) {
	s.prompt = s.prompt || prompt
	if !s.writing {
		s.writing = true
		go s.write() // until no lines are left; Flush waits for that
		return
	}
	if prompt {
		select {
		case s.wake <- struct{}{}:
		default: // it is told already
		}
	}
}

func (s *Spool) write() {
	for {
		s.mu.Lock()
		if len(s.lines) == 0 {
			s.writing = false
			s.idle.Broadcast()
			s.mu.Unlock()
			return
		}
		prompt := s.prompt
		s.mu.Unlock()
		if !prompt {
			s.pause()
		}
		s.mu.Lock()
		lines, dropped := s.lines, s.dropped
		s.lines, s.prompt, s.dropped = s.spare, false, 0
		s.mu.Unlock()
		if dropped > 0 && s.tell != nil {
			s.tell(dropped) // is a line itself, which comes next
		}
		s.put(lines)
		if s.spare = lines[:0]; cap(lines) > spoolKept {
			s.spare = nil
		}
	}
}

// pause waits for more lines.
func (s *Spool) pause() {
	if s.timer == nil {
		s.timer = time.NewTimer(spoolDelay)
	} else {
		s.timer.Reset(spoolDelay)
	}
	select {
	case <-s.timer.C:
	case <-s.wake:
		s.timer.Stop()
	}
}

// put writes lines. Those that the output refuses are lost; the line it tore is ended before the next is written.
func (s *Spool) put(lines []byte) {
	if s.torn {
		_, _ = s.out.Write([]byte{'\n'})
	}
	n, err := s.out.Write(lines)
	s.torn = n > 0 && lines[n-1] != '\n'
	if err == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost += uint64(bytes.Count(lines[n:], []byte{'\n'}))
}

// Flush has all lines written, if that can be done within the time, and reports whether it was. It is for the end of a program:
// who goes on writing keeps it from ending.
func (s *Spool) Flush(within time.Duration) bool {
	late := false
	timer := time.AfterFunc(within, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		late = true
		s.idle.Broadcast()
	})
	defer timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writing && !late {
		s.start(true)
		s.idle.Wait()
	}
	return !s.writing
}

// Lost is how many lines were dropped, or refused by the output.
func (s *Spool) Lost() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lost
}

// collector tells of lines that were lost.
func (s *Spool) collector() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "mistnet_log_lines_lost_total",
		Help: "Lines of the log and the access log that standard output did not take in time.",
	}, func() float64 { return float64(s.Lost()) })
}
