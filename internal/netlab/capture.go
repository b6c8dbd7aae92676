package netlab

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	maxFrameBytes   = 1 << 17 // above what segmentation offload hands over
	maxCaptureBytes = 64 << 20
	captureQueue    = 32 << 20 // bytes the kernel may hold for us
)

// Flow is one direction of what was captured between two addresses.
type Flow struct {
	Protocol uint8 // 6 TCP, 17 UDP
	Src, Dst netip.AddrPort
	Frames   int
	Payload  int // bytes above TCP or UDP
}

// Capture keeps what passes a namespace. Its methods may be called from several goroutines; each first takes in what the
// kernel has seen by then.
type Capture struct {
	file *os.File
	raw  syscall.RawConn
	done chan struct{}
	stop func() bool

	mu      sync.Mutex
	flows   map[flowKey]*flow
	kept    int
	frames  int
	stopped bool
	err     error
	buf     []byte
}

type flowKey struct {
	protocol uint8
	src, dst netip.AddrPort
}

type flow struct {
	frames  int
	bytes   int
	payload []byte // in the order of arrival, which on a fabric without loss is the stream's
	next    uint32 // TCP sequence number expected
	seen    bool
}

// Capture records all traffic between nodes, and between nodes and the control plane, until ctx ends or Stop.
func (l *Lab) Capture(ctx context.Context) (*Capture, error) { return l.CaptureIn(ctx, l.Fabric) }

// CaptureIn records what arrives on any link of one namespace. Frames that it sends are passed over: on the fabric they
// would be seen twice.
func (l *Lab) CaptureIn(ctx context.Context, n *Namespace) (*Capture, error) {
	fd := -1
	err := n.Do(func() (err error) {
		proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(proto))
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, fmt.Errorf("capture in %s: %w", n.NSName, err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureQueue) // with less, Err tells what was lost
	c := &Capture{
		file: os.NewFile(uintptr(fd), "capture"), done: make(chan struct{}), flows: map[flowKey]*flow{},
		buf: make([]byte, maxFrameBytes),
	}
	if c.raw, err = c.file.SyscallConn(); err != nil {
		c.file.Close()
		return nil, fmt.Errorf("capture in %s: %w", n.NSName, err)
	}
	go func() {
		defer close(c.done)
		// Each time there is something, it is taken in; the loop ends when the file is closed.
		_ = c.raw.Read(func(uintptr) bool { c.drain(); return false })
	}()
	c.stop = context.AfterFunc(ctx, func() { _ = c.Stop() })
	return c, nil
}

// drain takes in everything the kernel holds.
func (c *Capture) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped {
		return
	}
	_ = c.raw.Control(func(fd uintptr) {
		for {
			n, from, err := unix.Recvfrom(int(fd), c.buf, unix.MSG_TRUNC)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				if err != unix.EAGAIN && err != unix.ENETDOWN && c.err == nil {
					c.err = os.NewSyscallError("recvfrom", err)
				}
				break
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype != unix.PACKET_OUTGOING {
				c.frame(c.buf[:min(n, len(c.buf))])
			}
		}
		// Reading the counters resets them; one loss is enough to say so.
		if st, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil && st.Drops > 0 && c.err == nil {
			c.err = fmt.Errorf("capture lost %d frames", st.Drops)
		}
	})
}

// frame takes one Ethernet frame apart; the caller holds the lock.
func (c *Capture) frame(b []byte) {
	c.frames++
	if len(b) < 14 {
		return
	}
	var src, dst netip.Addr
	var protocol uint8
	etherType, p := binary.BigEndian.Uint16(b[12:]), b[14:]
	switch {
	case etherType == unix.ETH_P_IP && len(p) >= 20:
		head, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
		if total == 0 || total > len(p) { // 0: too large for the field, by segmentation offload
			total = len(p)
		}
		if head < 20 || head > total {
			return
		}
		src, dst, protocol = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[9]
		p = p[head:total]
	case etherType == unix.ETH_P_IPV6 && len(p) >= 40:
		src, dst, protocol = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[6]
		p = p[40:]
	default:
		return
	}
	c.segment(protocol, src, dst, p)
}

// segment files what TCP or UDP carries.
func (c *Capture) segment(protocol uint8, src, dst netip.Addr, p []byte) {
	head, seq := 8, uint32(0)
	if protocol == unix.IPPROTO_TCP && len(p) >= 20 {
		head, seq = int(p[12]>>4)*4, binary.BigEndian.Uint32(p[4:])
	} else if protocol != unix.IPPROTO_UDP {
		return
	}
	if head < 8 || len(p) < head {
		return
	}
	k := flowKey{
		protocol, netip.AddrPortFrom(src, binary.BigEndian.Uint16(p)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(p[2:])),
	}
	f := c.flows[k]
	if f == nil {
		f = &flow{}
		c.flows[k] = f
	}
	f.frames++
	data := p[head:]
	if len(data) == 0 {
		return
	}
	if protocol == unix.IPPROTO_TCP {
		end := seq + uint32(len(data))
		if f.seen && int32(end-f.next) <= 0 {
			return // sent again
		}
		if over := int32(f.next - seq); f.seen && over > 0 && int(over) < len(data) {
			data = data[over:]
		}
		f.next, f.seen = end, true
	}
	f.bytes += len(data)
	if c.kept += len(data); c.kept > maxCaptureBytes {
		if c.err == nil {
			c.err = fmt.Errorf("capture holds more than %d bytes", maxCaptureBytes)
		}
		return
	}
	f.payload = append(f.payload, data...)
}

// Contains reports whether any flow carried what, also when it was spread over several segments.
func (c *Capture) Contains(what []byte) bool {
	c.drain()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.flows {
		if bytes.Contains(f.payload, what) {
			return true
		}
	}
	return false
}

// Flows returns what was captured, ordered by source and destination.
func (c *Capture) Flows() []Flow {
	c.drain()
	c.mu.Lock()
	defer c.mu.Unlock()
	var fs []Flow
	for k, f := range c.flows {
		fs = append(fs, Flow{Protocol: k.protocol, Src: k.src, Dst: k.dst, Frames: f.frames, Payload: f.bytes})
	}
	slices.SortFunc(fs, func(a, b Flow) int {
		return cmp.Or(a.Src.Compare(b.Src), a.Dst.Compare(b.Dst), cmp.Compare(a.Protocol, b.Protocol))
	})
	return fs
}

// Frames returns how many frames were seen, of whatever kind.
func (c *Capture) Frames() int {
	c.drain()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.frames
}

// Stop takes in what is there and ends the capture; what was captured can still be asked for. It returns an error when the
// capture is not complete: then that something is absent proves nothing.
func (c *Capture) Stop() error {
	c.drain()
	c.mu.Lock()
	first := !c.stopped
	c.stopped = true
	c.mu.Unlock()
	if first {
		c.stop()
		c.file.Close()
		<-c.done
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
