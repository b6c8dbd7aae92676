package waypoint

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// serveAnnounced serves the connections that a ztunnel has taken out of their tunnels already: a waypoint in a pod that is
// itself enrolled (ambient.istio.io/waypoint-inbound-binding: PROXY). Each begins with a PROXY protocol header that says who
// calls whom. It stops accepting when ctx is done; served is done with the last connection.
func (w *Waypoint) serveAnnounced(ctx context.Context, served *sync.WaitGroup) error {
	if w.cfg.ProxyAddr == "" {
		return nil
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", w.cfg.ProxyAddr)
	if err != nil {
		return fmt.Errorf("open the listener of announced connections (-proxy-addr): %w", err)
	}
	if at, ok := ln.Addr().(*net.TCPAddr); ok && !at.IP.IsLoopback() {
		w.log.Warn("whoever reaches this address can say who it is", zap.Stringer("addr", at))
	}
	served.Go(func() {
		err := daemon.Serve(ctx, ln, w.cfg.Grace, func(ctx context.Context, raw net.Conn) {
			defer raw.Close()
			if err := w.announced(ctx, raw.(*net.TCPConn)); err != nil {
				w.rep.limited.Warn("announced connection refused", zap.Stringer("src.addr", raw.RemoteAddr()), zap.Error(err))
			}
		})
		if err != nil && ctx.Err() == nil {
			w.log.Error("no longer accepting announced connections", zap.Error(err))
		}
	})
	return nil
}

// announcedWithin is how long a connection has to say whose it is.
const announcedWithin = 5 * time.Second

func (w *Waypoint) announced(ctx context.Context, raw *net.TCPConn) error {
	// What is under way may go on; when its time is over, all of it ends at once.
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	_ = raw.SetReadDeadline(time.Now().Add(announcedWithin))
	from, to, err := readAnnouncement(raw)
	if err != nil {
		return err
	}
	_ = raw.SetReadDeadline(time.Time{})
	t, err := w.between(from, hbone.Header{}, to.String(), to)
	if err != nil {
		return err
	}
	reset := func() { _ = errors.Join(raw.SetLinger(0), raw.Close()) }
	t.serveTaken(ctx, raw, reset)
	return nil
}

// The parts of a header of the PROXY protocol, version 2 (haproxy.org, proxy-protocol.txt, 2.2).
const (
	proxySignature  = "\r\n\r\n\x00\r\nQUIT\n"
	proxyHeaderSize = 16   // signature, version and command, family, length
	proxyMaxBytes   = 2048 // of what follows
	proxyCommand    = 0x21 // version 2, PROXY
	proxyTCP4       = 0x11
	proxyTCP6       = 0x21
	proxyIdentity   = 0xD0 // a TLV of Istio's: the client's SPIFFE URI
)

// readAnnouncement reads a header and not a byte more. A connection without an identity is refused: it did not come through a
// tunnel.
func readAnnouncement(r io.Reader) (client, netip.AddrPort, error) {
	var head [proxyHeaderSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return client{}, netip.AddrPort{}, fmt.Errorf("read PROXY header: %w", err)
	}
	size := int(binary.BigEndian.Uint16(head[14:]))
	if !bytes.HasPrefix(head[:], []byte(proxySignature)) || head[12] != proxyCommand || size > proxyMaxBytes {
		return client{}, netip.AddrPort{}, errors.New("not a PROXY header of version 2")
	}
	rest := make([]byte, size)
	if _, err := io.ReadFull(r, rest); err != nil {
		return client{}, netip.AddrPort{}, fmt.Errorf("read PROXY header: %w", err)
	}
	return parseAnnouncement(head[13], rest)
}

// parseAnnouncement reads the addresses and fields of a header.
func parseAnnouncement(family byte, b []byte) (from client, to netip.AddrPort, err error) {
	n := map[byte]int{proxyTCP4: 4, proxyTCP6: 16}[family]
	if n == 0 || len(b) < 2*n+4 {
		return client{}, netip.AddrPort{}, errors.New("PROXY header without two TCP addresses")
	}
	src, _ := netip.AddrFromSlice(b[:n]) // 4 or 16 bytes are an address
	dst, _ := netip.AddrFromSlice(b[n : 2*n])
	b = b[2*n:]
	from.addr = mesh.Unmap(netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)))
	to = mesh.Unmap(netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])))
	for b = b[4:]; len(b) > 0; {
		if len(b) < 3 || len(b) < 3+int(binary.BigEndian.Uint16(b[1:])) {
			return client{}, netip.AddrPort{}, errors.New("PROXY header with a field that does not end")
		}
		value := b[3 : 3+int(binary.BigEndian.Uint16(b[1:]))]
		if b[0] == proxyIdentity {
			if from.id, err = mesh.ParseIdentity(string(value)); err != nil {
				return client{}, netip.AddrPort{}, fmt.Errorf("PROXY header: %w", err)
			}
		}
		b = b[3+len(value):]
	}
	if from.id.IsZero() {
		return client{}, netip.AddrPort{}, errors.New("PROXY header without the client's identity")
	}
	return from, to, nil
}
