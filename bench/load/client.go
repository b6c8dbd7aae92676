package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// grace is how long past its end a slice may hang before its connections are cut.
const grace = 10 * time.Second

// Run carries out one order. What goes wrong is in Report.Error, so that an agent can always answer.
func Run(ctx context.Context, o Order) Report {
	limit := o.Warm + o.Slice + grace
	if o.Kind == Idle {
		limit += 2 * grace // thousands of connections take a while
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r, err := run(ctx, o)
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

func run(ctx context.Context, o Order) (Report, error) {
	switch o.Kind {
	case Probe:
		return Report{Ops: 1}, connectOnce(ctx, o.Addr)
	case Bulk:
		return runBulk(ctx, o)
	case Echo:
		return runEcho(ctx, o)
	case Connect:
		return runConnect(ctx, o)
	case HTTP1, Paced, HTTP2, GRPC, Idle:
		return runHTTP(ctx, o)
	}
	return Report{}, fmt.Errorf("unknown kind of slice %q", o.Kind)
}

// dial connects; the connection is cut when ctx ends.
func dial(ctx context.Context, addr string) (*net.TCPConn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if end, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(end); err != nil {
			c.Close()
			return nil, err
		}
	}
	return c.(*net.TCPConn), nil
}

func runBulk(ctx context.Context, o Order) (Report, error) {
	c, err := dial(ctx, o.Addr)
	if err != nil {
		return Report{}, err
	}
	defer c.Close()
	if _, err := c.Write([]byte{modeBulk}); err != nil {
		return Report{}, err
	}
	block := make([]byte, bulkBlockBytes)
	for i := range block[1:] {
		block[i+1] = byte(i * 131)
	}
	before, err := pour(c, block, o.Warm)
	if err != nil {
		return Report{}, fmt.Errorf("warm-up: %w", err)
	}
	w, err := openWindow(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	after, err := pour(c, block, o.Slice)
	if err != nil {
		return Report{}, err
	}
	r, err := w.close()
	r.Bytes = int64(after - before)
	r.Ops = r.Bytes / bulkBlockBytes
	return r, err
}

// pour sends blocks for d and returns the server's count once it has swallowed the last of them: nothing is in flight then.
func pour(c net.Conn, block []byte, d time.Duration) (uint64, error) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		block[0] = blockPlain
		if _, err := c.Write(block); err != nil {
			return 0, err
		}
	}
	block[0] = blockCount
	if _, err := c.Write(block); err != nil {
		return 0, err
	}
	var answer [8]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		return 0, fmt.Errorf("wait for the server's count: %w", err)
	}
	return binary.BigEndian.Uint64(answer[:]), nil
}

func runEcho(ctx context.Context, o Order) (Report, error) {
	c, err := dial(ctx, o.Addr)
	if err != nil {
		return Report{}, err
	}
	defer c.Close()
	head := binary.BigEndian.AppendUint32([]byte{modeEcho}, uint32(o.Size))
	if _, err := c.Write(head); err != nil {
		return Report{}, err
	}
	buf := make([]byte, o.Size)
	took := make([]time.Duration, 0, 1<<18)
	if _, err := exchange(c, buf, o.Warm, took); err != nil {
		return Report{}, fmt.Errorf("warm-up: %w", err)
	}
	w, err := openWindow(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	took, err = exchange(c, buf, o.Slice, took[:0])
	if err != nil {
		return Report{}, err
	}
	r, err := w.close()
	r.Ops, r.Bytes = int64(len(took)), int64(len(took)*o.Size)
	r.P50, r.P99 = quantiles(took)
	return r, err
}

// exchange bounces buf for d and appends the time each round took.
func exchange(c net.Conn, buf []byte, d time.Duration, took []time.Duration) ([]time.Duration, error) {
	start := time.Now()
	for end := start.Add(d); start.Before(end); {
		if _, err := c.Write(buf); err != nil {
			return took, err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return took, err
		}
		now := time.Now()
		took = append(took, now.Sub(start))
		start = now
	}
	return took, nil
}

// quantiles sorts took and returns its median and 99th percentile (nearest rank).
func quantiles(took []time.Duration) (p50, p99 time.Duration) {
	if len(took) == 0 {
		return 0, 0
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[min(int(q*float64(len(took))), len(took)-1)] }
	return at(0.50), at(0.99)
}

func runConnect(ctx context.Context, o Order) (Report, error) {
	if _, _, err := churn(ctx, o, o.Warm); err != nil {
		return Report{}, fmt.Errorf("warm-up: %w", err)
	}
	w, err := openWindow(o.PIDs)
	if err != nil {
		return Report{}, err
	}
	took, failed, err := churn(ctx, o, o.Slice)
	r, werr := w.close()
	r.Ops, r.Failed = int64(len(took)), failed
	r.P50, r.P99 = quantiles(took)
	return r, errors.Join(err, werr)
}

// churn runs o.Clients loops of connectOnce for d. A connection that breaks is counted; if none succeeds, the last error is returned.
func churn(ctx context.Context, o Order, d time.Duration) (took []time.Duration, failed int64, err error) {
	type tally struct {
		took   []time.Duration
		failed int64
		last   error
	}
	tallies := make([]tally, max(o.Clients, 1))
	end := time.Now().Add(d)
	var wg sync.WaitGroup
	for i := range tallies {
		t := &tallies[i]
		wg.Go(func() {
			for start := time.Now(); start.Before(end) && ctx.Err() == nil; {
				err := connectOnce(ctx, o.Addr)
				now := time.Now()
				if err != nil {
					t.failed, t.last = t.failed+1, err
				} else {
					t.took = append(t.took, now.Sub(start))
				}
				start = now
			}
		})
	}
	wg.Wait()
	for _, t := range tallies {
		took = append(took, t.took...)
		failed += t.failed
		err = errors.Join(err, t.last)
	}
	if len(took) > 0 {
		err = nil
	}
	return took, failed, err
}

// connectOnce opens a connection, exchanges one byte, and closes with a reset so that no port is left in TIME_WAIT.
func connectOnce(ctx context.Context, addr string) error {
	c, err := dial(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetLinger(0); err != nil {
		return err
	}
	b := []byte{modeConnect}
	if _, err := c.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("wait for the echoed byte: %w", err)
	}
	return nil
}
