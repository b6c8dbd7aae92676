package load

import (
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"
)

// pacer makes HTTP/1.1 requests when they are due. It has a thread of its own that sleeps and waits in the kernel: the runtime's
// timers are late by up to a millisecond when nothing else goes on.
type pacer struct {
	*h1Client
	period time.Duration
	rng    *rand.Rand
}

func newPacer(c net.Conn, o Order, index int) (speaker, error) {
	if o.Rate <= 0 {
		return nil, errors.New("a paced order without a rate")
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.New("a paced order through a tunnel")
	}
	f, err := tcp.File()
	if err != nil {
		return nil, err
	}
	if err := tcp.Close(); err != nil { // the file goes on
		return nil, errors.Join(err, f.Close())
	}
	fd := int(f.Fd()) // which makes its calls wait
	limit := syscall.NsecToTimeval(int64(grace))
	if err := syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &limit); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	h := newH1Client(&blockingConn{Conn: c, file: f, fd: fd}, o)
	return &pacer{h1Client: h, period: time.Duration(float64(o.Conns) / o.Rate * float64(time.Second)), rng: rand.New(rand.NewPCG(uint64(index), 1))}, nil
}

// speak makes one request in each period, at a random moment of it, so that connections do not march in step.
func (p *pacer) speak(end time.Time, got *tally) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for begin := time.Now(); ; begin = begin.Add(p.period) {
		due := begin.Add(time.Duration(p.rng.Int64N(int64(p.period))))
		if !due.Before(end) {
			sleepUntil(end)
			return nil
		}
		if sleepUntil(due) {
			got.lag = append(got.lag, time.Since(due))
		}
		n, err := p.exchange()
		if err != nil {
			return err
		}
		got.took, got.bytes = append(got.took, time.Since(due)), got.bytes+int64(n)
	}
}

// sleepUntil reports whether there was time to sleep.
func sleepUntil(t time.Time) bool {
	slept := false
	for wait := time.Until(t); wait > 0; wait = time.Until(t) { // a signal may come first
		ts := syscall.NsecToTimespec(int64(wait))
		_ = syscall.Nanosleep(&ts, nil)
		slept = true
	}
	return slept
}

// Close closes the connection.
func (p *pacer) Close() error { return p.conn.Close() }

// blockingConn is a socket whose reads and writes wait in the kernel, on the thread that calls.
type blockingConn struct {
	net.Conn
	file *os.File
	fd   int
}

func (c *blockingConn) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(c.fd, b)
		if n == 0 && err == nil {
			return 0, errors.New("the connection was closed")
		}
		if !errors.Is(err, syscall.EINTR) {
			return max(n, 0), err
		}
	}
}

func (c *blockingConn) Write(b []byte) (int, error) {
	sent := 0
	for sent < len(b) {
		n, err := syscall.Write(c.fd, b[sent:])
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return sent, err
		}
		sent += max(n, 0)
	}
	return sent, nil
}

func (c *blockingConn) Close() error { return c.file.Close() }
