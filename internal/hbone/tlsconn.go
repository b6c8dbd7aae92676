package hbone

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"

	"github.com/mistnet/mistnet/internal/hbone/record"
	"github.com/mistnet/mistnet/internal/memlimit"
)

const recordHeaderBytes = record.HeaderBytes

// batchConn is the transport beneath the records. crypto/tls makes one system call per 16 KB record in each direction;
// batchConn reads as much as the socket has and feeds it from memory, and collects records until flush writes them at
// once.
//
// Reads never hand over bytes of two records, so crypto/tls never holds input beyond the record it is decrypting and
// buffered tells truly whether the next Read would wait. For the same reason our own records can take over from
// crypto/tls when the handshake is done.
type batchConn struct {
	net.Conn
	rc  syscall.RawConn  // nil for connections without a file descriptor
	mem *memlimit.Budget // what the slabs in use are charged to

	// Reading; one goroutine at a time.
	in      []byte // slab, nil when nothing is buffered
	r, w    int    // in[r:w] is unread
	header  [recordHeaderBytes]byte
	hn      int // bytes of the record header handed over so far
	left    int // bytes of the record body still to hand over
	readN   int
	readErr error
	readFn  func(fd uintptr) bool

	mu      sync.Mutex // guards out and batching: crypto/tls may answer a KeyUpdate while a writer collects
	out     []byte     // records collected since the last flush
	collect bool       // false while the handshake runs: every write goes out at once
	stopped bool       // nothing is written any more

	// Flushing; only whoever holds the connection's writer role.
	sending  []byte // being written
	sent     int
	block    bool
	writeErr error
	writeFn  func(fd uintptr) bool
}

func newBatchConn(raw net.Conn, mem *memlimit.Budget) *batchConn {
	b := &batchConn{Conn: raw, mem: mem}
	if sc, ok := raw.(syscall.Conn); ok {
		if rc, err := sc.SyscallConn(); err == nil {
			b.rc = rc
		}
	}
	b.readFn = b.readOnce
	b.writeFn = b.writeSome
	return b
}

// borrow returns a slab that is counted as in use until giveBack.
func (b *batchConn) borrow() []byte {
	b.mem.Charge(batchBytes)
	return batchSlabs.Get()
}

func (b *batchConn) giveBack(p []byte) {
	b.mem.Release(batchBytes)
	batchSlabs.Put(p)
}

// stopWriting forgets what was not written. Its slabs are left to the collector: who was cut off may still be looking at one.
func (b *batchConn) stopWriting() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stopped = true
	for _, p := range [...]*[]byte{&b.out, &b.sending} {
		if *p != nil {
			b.mem.Release(batchBytes)
			*p = nil
		}
	}
}

// Read implements net.Conn for crypto/tls.
func (b *batchConn) Read(p []byte) (int, error) {
	if b.r == b.w {
		if err := b.fill(); err != nil {
			return 0, err
		}
	}
	n := 0
	if b.left == 0 {
		k := copy(b.header[b.hn:], b.in[b.r:b.w])
		k = min(k, len(p))
		copy(p, b.in[b.r:b.r+k])
		b.r += k
		b.hn += k
		n = k
		if b.hn == recordHeaderBytes {
			b.hn = 0
			b.left = int(b.header[3])<<8 | int(b.header[4])
		}
	}
	if b.left > 0 && n < len(p) {
		k := min(b.left, b.w-b.r)
		k = copy(p[n:], b.in[b.r:b.r+k])
		b.r += k
		b.left -= k
		n += k
	}
	if b.r == b.w {
		b.release()
	}
	return n, nil
}

func (b *batchConn) release() {
	if b.in != nil {
		b.giveBack(b.in)
	}
	b.in, b.r, b.w = nil, 0, 0
}

// record waits for a whole record and returns it. It stays where it is until recordDone.
func (b *batchConn) record() ([]byte, error) {
	for need := recordHeaderBytes; ; {
		if b.w-b.r >= need {
			header := b.in[b.r : b.r+recordHeaderBytes]
			if err := record.CheckHeader(header); err != nil {
				return nil, err
			}
			need = record.Length(header)
			if b.w-b.r >= need {
				b.left = need
				return b.in[b.r : b.r+need], nil
			}
		}
		if err := b.fill(); err != nil {
			return nil, err
		}
	}
}

// recordDone gives up the record that record returned.
func (b *batchConn) recordDone() {
	b.r += b.left
	b.left = 0
	if b.r == b.w {
		b.release()
	}
}

// buffered reports whether a whole record waits in memory, or the start of one that will be refused.
func (b *batchConn) buffered() bool {
	n := b.w - b.r
	if n < recordHeaderBytes || b.left != 0 || b.hn != 0 {
		return false
	}
	header := b.in[b.r : b.r+recordHeaderBytes]
	return n >= record.Length(header) || record.CheckHeader(header) != nil
}

// fill waits for input and reads what there is. While it waits with nothing buffered it holds no slab.
func (b *batchConn) fill() error {
	if b.r == b.w {
		b.r, b.w = 0, 0
	} else if batchBytes-b.w < 32<<10 {
		b.w = copy(b.in, b.in[b.r:b.w])
		b.r = 0
	}
	if b.rc == nil {
		if b.in == nil {
			b.in = b.borrow()
		}
		n, err := b.Conn.Read(b.in[b.w:])
		b.w += n
		if n > 0 {
			return nil
		}
		return b.cut(err)
	}
	err := b.rc.Read(b.readFn)
	if err == nil {
		err = b.readErr
	}
	if err != nil {
		b.release()
		return b.cut(err)
	}
	b.w += b.readN
	return nil
}

// cut makes a connection's end an unexpected one: TLS has an end of its own, which would have been read before (RFC
// 8446, 6.1). The handshake leaves that to crypto/tls.
func (b *batchConn) cut(err error) error {
	if err == io.EOF && b.collect {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (b *batchConn) readOnce(fd uintptr) bool {
	if b.in == nil {
		b.in = b.borrow()
	}
	for {
		n, err := syscall.Read(int(fd), b.in[b.w:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			if b.r == b.w {
				b.release()
			}
			return false
		case err != nil:
			b.readN, b.readErr = 0, err
		case n == 0:
			b.readN, b.readErr = 0, io.EOF
		default:
			b.readN, b.readErr = n, nil
		}
		return true
	}
}

// wait returns when a Read would find input, without holding a slab until then. Connections without a file descriptor
// cannot tell: they read, and hold one.
func (b *batchConn) wait() error {
	if b.buffered() {
		return nil
	}
	return b.fill()
}

// Write implements net.Conn for crypto/tls: after the handshake it only collects.
func (b *batchConn) Write(p []byte) (int, error) {
	b.mu.Lock()
	if b.stopped {
		b.mu.Unlock()
		return 0, net.ErrClosed
	}
	if !b.collect {
		b.mu.Unlock()
		return b.Conn.Write(p)
	}
	if b.out == nil {
		b.out = b.borrow()[:0]
	}
	b.out = append(b.out, p...)
	b.mu.Unlock()
	return len(p), nil
}

// output is what was collected so far, for records that whoever holds the writer's role appends and puts back in out.
func (b *batchConn) output() []byte {
	if b.out == nil {
		b.out = b.borrow()[:0]
	}
	return b.out
}

// startCollecting ends the handshake phase.
func (b *batchConn) startCollecting() {
	b.mu.Lock()
	b.collect = true
	b.mu.Unlock()
}

// flush writes what was collected. With block false it returns done == false as soon as the socket would block (or
// cannot tell); the rest stays and a later flush goes on with it.
func (b *batchConn) flush(block bool) (done bool, err error) {
	for {
		if b.sending == nil {
			b.mu.Lock()
			b.sending, b.sent, b.out = b.out, 0, nil
			b.mu.Unlock()
			if len(b.sending) == 0 {
				return true, nil
			}
		}
		if b.rc == nil {
			if !block {
				return false, nil
			}
			_, err = b.Conn.Write(b.sending)
			b.sent = len(b.sending)
		} else {
			b.block, b.writeErr = block, nil
			if err = b.rc.Write(b.writeFn); err == nil {
				err = b.writeErr
			}
		}
		if err != nil {
			return false, err
		}
		if b.sent < len(b.sending) {
			return false, nil
		}
		b.giveBack(b.sending)
		b.sending = nil
	}
}

func (b *batchConn) writeSome(fd uintptr) bool {
	for b.sent < len(b.sending) {
		n, err := syscall.Write(int(fd), b.sending[b.sent:])
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return !b.block
		case err != nil:
			b.writeErr = err
			return true
		default:
			b.sent += n
		}
	}
	return true
}

// Socket options of a tunnel's TCP connection, as ztunnel sets them.
const (
	keepAliveIdleSeconds     = 180
	keepAliveIntervalSeconds = 180
	keepAliveProbes          = 9
	notSentLowatBytes        = 128 << 10
	tcpNotSentLowat          = 0x19 // TCP_NOTSENT_LOWAT, linux/tcp.h; not in package syscall
)

// tune sets the options of a tunnel's TCP connection. TCP_NOTSENT_LOWAT keeps a ping or a small message from waiting
// behind megabytes of bulk in the kernel's send buffer.
func tune(raw net.Conn) error {
	tc, ok := raw.(*net.TCPConn)
	if !ok {
		return nil
	}
	rc, err := tc.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	set := func(fd, level, option, value int) {
		setErr = errors.Join(setErr, syscall.SetsockoptInt(fd, level, option, value))
	}
	err = rc.Control(func(fd uintptr) {
		set(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
		set(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1)
		set(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, keepAliveIdleSeconds)
		set(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, keepAliveIntervalSeconds)
		set(int(fd), syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT, keepAliveProbes)
		set(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, notSentLowatBytes)
	})
	return errors.Join(err, setErr)
}
