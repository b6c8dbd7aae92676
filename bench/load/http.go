package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

// speaker is a client's end of one connection that speaks some HTTP.
type speaker interface {
	// speak keeps its requests under way until end, waits for the last answers, and adds to got.
	speak(end time.Time, got *tally) error
	// once makes a single exchange.
	once() error
}

// tally is what one connection's exchanges came to.
type tally struct {
	took  []time.Duration
	lag   []time.Duration
	bytes int64
}

// runHTTP carries out an order of HTTP.
func runHTTP(ctx context.Context, o Order) (Report, error) {
	opener, err := newOpener(o)
	if err != nil {
		return Report{}, err
	}
	defer opener.close()
	if o.Kind == Idle {
		return runIdle(ctx, o, opener)
	}
	speakers := make([]speaker, max(o.Conns, 1))
	for i := range speakers {
		c, err := opener.open(ctx)
		if err != nil {
			return Report{}, err
		}
		defer c.Close()
		if speakers[i], err = newSpeaker(o, c, i); err != nil {
			return Report{}, err
		}
		if own, ok := speakers[i].(io.Closer); ok { // it has the connection in a form of its own
			defer own.Close()
		}
	}
	if o.Once {
		for _, s := range speakers {
			if err := s.once(); err != nil {
				return Report{}, err
			}
		}
		return Report{Ops: int64(len(speakers))}, nil
	}
	if _, err := converse(speakers, o.Warm); err != nil {
		return Report{}, fmt.Errorf("warm-up: %w", err)
	}
	w, err := openWindow(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	got, err := converse(speakers, o.Slice)
	r, werr := w.close()
	r.Ops, r.Bytes = int64(len(got.took)), got.bytes
	r.P50, r.P99 = quantiles(got.took)
	_, r.Lag = quantiles(got.lag)
	return r, errors.Join(err, werr)
}

func newSpeaker(o Order, c net.Conn, index int) (speaker, error) {
	switch o.Kind {
	case HTTP2, GRPC:
		return newH2Client(c, o)
	case Paced:
		return newPacer(c, o, index)
	}
	return newH1Client(c, o), nil
}

// converse lets all speakers speak for d and sums up what they got.
func converse(speakers []speaker, d time.Duration) (tally, error) {
	all, errs := make([]tally, len(speakers)), make([]error, len(speakers))
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	for i, s := range speakers {
		wg.Go(func() { errs[i] = s.speak(end, &all[i]) })
	}
	wg.Wait()
	var sum tally
	for i := range all {
		sum.took, sum.lag, sum.bytes = append(sum.took, all[i].took...), append(sum.lag, all[i].lag...), sum.bytes+all[i].bytes
	}
	return sum, errors.Join(errs...)
}

// idleAtOnce bounds how many of an Idle order's connections have a request under way, and so how many connections of its own
// the proxy needs for them.
const idleAtOnce = 32

// runIdle opens the connections and reports by how much the processes grew, once they have had Slice to settle.
func runIdle(ctx context.Context, o Order, opener *opener) (Report, error) {
	before, err := readMemory(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	clients, errs := make([]*h1Client, o.Conns), make([]error, o.Conns)
	var wg sync.WaitGroup
	for n := range idleAtOnce {
		wg.Go(func() {
			for i := n; i < len(clients) && ctx.Err() == nil; i += idleAtOnce {
				c, err := opener.open(ctx)
				if err != nil {
					errs[i] = err
					return
				}
				clients[i] = newH1Client(c, o)
				if errs[i] = clients[i].once(); errs[i] != nil {
					return
				}
				clients[i].rest()
			}
		})
	}
	wg.Wait()
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.conn.Close()
			}
		}
	}()
	if err := errors.Join(errs...); err != nil {
		return Report{}, err
	}
	settled := time.NewTimer(o.Slice)
	defer settled.Stop()
	select {
	case <-settled.C:
	case <-ctx.Done():
		return Report{}, context.Cause(ctx)
	}
	after, err := readMemory(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	for i := 0; i < len(clients); i += max(len(clients)/100, 1) { // they are all still there
		if err := clients[i].once(); err != nil {
			return Report{}, fmt.Errorf("connection %d after its rest: %w", i, err)
		}
	}
	return Report{Ops: int64(o.Conns), Memory: after - before, Procs: 1}, nil
}

// opener makes connections as an order asks for them.
type opener struct {
	o    Order
	pool *hbone.Pool // nil: without a tunnel
	to   hbone.Target
}

func newOpener(o Order) (*opener, error) {
	p := &opener{o: o}
	if o.Tunnel == nil {
		return p, nil
	}
	svid, err := readSVID(o.Tunnel)
	if err != nil {
		return nil, err
	}
	expect, err := mesh.ParseIdentity(o.Tunnel.Expect)
	if err != nil {
		return nil, err
	}
	addr, err := netip.ParseAddrPort(o.Addr)
	if err != nil {
		return nil, err
	}
	p.to = hbone.Target{Local: svid.ID, Addr: addr, Expect: []mesh.Identity{expect}}
	p.pool = hbone.NewPool(hbone.PoolConfig{
		MaxStreams: 1000,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
		},
		TLS: func(_ context.Context, to hbone.Target) (*tls.Config, error) {
			return identity.ClientConfig(svid, to.Expect), nil
		},
	})
	return p, nil
}

func readSVID(t *Tunnel) (*identity.SVID, error) {
	id, err := mesh.ParseIdentity(t.Local)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, err
	}
	root, err := os.ReadFile(t.Root)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(root) {
		return nil, fmt.Errorf("no certificate in %s", t.Root)
	}
	if _, ok := pair.PrivateKey.(*ecdsa.PrivateKey); !ok {
		return nil, fmt.Errorf("%s: want an ECDSA key", t.Key)
	}
	return &identity.SVID{
		ID: id, Certificate: pair, Roots: roots, NotBefore: pair.Leaf.NotBefore, NotAfter: pair.Leaf.NotAfter, Trust: new(identity.Trust),
	}, nil
}

// open makes a connection; it is cut when ctx ends.
func (p *opener) open(ctx context.Context) (net.Conn, error) {
	if p.pool != nil {
		s, err := p.pool.Open(ctx, p.to, p.o.Tunnel.Authority, hbone.Header{})
		if err != nil {
			return nil, err
		}
		if end, ok := ctx.Deadline(); ok {
			if err := s.SetDeadline(end); err != nil {
				return nil, errors.Join(err, s.Close())
			}
		}
		return s, nil
	}
	c, err := dial(ctx, p.o.Addr)
	if err != nil {
		return nil, err
	}
	if len(p.o.Prelude) > 0 {
		if _, err := c.Write(p.o.Prelude); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	return c, nil
}

func (p *opener) close() {
	if p.pool != nil {
		_ = p.pool.Close() // the connections' end is not measured
	}
}
