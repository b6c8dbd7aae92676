package scenario

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/peers"
)

// readyWithin is how long a contender has from its start to the first byte echoed through it.
const readyWithin = 20 * time.Second

// agent is a load process in a client's namespace.
type agent struct {
	proc   *peers.Process
	in     io.WriteCloser
	orders *json.Encoder
	out    *json.Decoder
}

// agents are the load processes of a run: one client for each client namespace, one server for each listening place.
type agents struct {
	self, dir string // our own program, which is also the load's
	clients   map[string]*agent
	servers   map[string]*agent
}

func newAgents(self, dir string) *agents {
	return &agents{self: self, dir: dir, clients: make(map[string]*agent), servers: make(map[string]*agent)}
}

// serve makes sure a load server listens where r wants it.
func (a *agents) serve(r *peers.Running) error {
	key := fmt.Sprintf("%s %d", r.Server.NetNS, r.Listen)
	if a.servers[key] != nil {
		return nil
	}
	log := filepath.Join(a.dir, fmt.Sprintf("load-server-%d.log", len(a.servers)))
	proc, in, out, err := peers.Talk(r.Server.NetNS, log, a.self, "load", "server", "-listen", fmt.Sprintf("0.0.0.0:%d", r.Listen))
	if err != nil {
		return err
	}
	a.servers[key] = &agent{proc: proc, in: in}
	line, err := bufio.NewReader(out).ReadString('\n')
	if strings.TrimSpace(line) != load.Ready {
		return fmt.Errorf("load server said %q, want %q: %w", line, load.Ready, errors.Join(err, proc.Exited()))
	}
	return nil
}

// client returns the load client in r's client namespace.
func (a *agents) client(r *peers.Running) (*agent, error) {
	if c := a.clients[r.Client.NetNS]; c != nil {
		return c, nil
	}
	log := filepath.Join(a.dir, fmt.Sprintf("load-client-%d.log", len(a.clients)))
	proc, in, out, err := peers.Talk(r.Client.NetNS, log, a.self, "load", "agent")
	if err != nil {
		return nil, err
	}
	c := &agent{proc: proc, in: in, orders: json.NewEncoder(in), out: json.NewDecoder(out)}
	a.clients[r.Client.NetNS] = c
	return c, nil
}

// do sends an order through r and waits for the report. When ctx ends first, the agent is stopped for good.
func (a *agents) do(ctx context.Context, r *peers.Running, o load.Order) (load.Report, error) {
	c, err := a.client(r)
	if err != nil {
		return load.Report{}, err
	}
	stop := context.AfterFunc(ctx, func() { c.proc.Stop() })
	defer stop()
	if o.Addr == "" {
		o.Addr, o.PIDs = r.Addr.String(), r.PIDs
	}
	if ctx.Err() != nil {
		return load.Report{}, context.Cause(ctx)
	}
	if err := c.orders.Encode(o); err != nil {
		return load.Report{}, fmt.Errorf("order: %w", cmp.Or(context.Cause(ctx), err))
	}
	var rep load.Report
	if err := c.out.Decode(&rep); err != nil {
		return load.Report{}, fmt.Errorf("read the load client's report: %w", cmp.Or(context.Cause(ctx), err))
	}
	return rep, nil
}

// aim fills in where an order goes: to r's site of that name, or with none to r.
func aim(o load.Order, r *peers.Running, site string) load.Order {
	s, ok := r.Sites[site]
	if !ok {
		return o
	}
	o.Addr, o.PIDs, o.Host, o.Path, o.Prelude = s.Addr.String(), r.PIDs, host, s.Path, s.Prelude
	if s.PIDs != nil {
		o.PIDs = s.PIDs
	}
	if h := s.HBONE; h != nil {
		o.Tunnel = &load.Tunnel{Authority: h.Authority, Cert: h.Cert, Key: h.Key, Root: h.Root, Local: h.Local, Expect: h.Expect}
	}
	return o
}

// host is what requests name in their Host.
const host = "one.bench.svc.cluster.local"

// await sends probe through r until it succeeds.
func (a *agents) await(outer context.Context, r *peers.Running, probe load.Order, within time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(outer, within, fmt.Errorf("no byte came through within %v", within))
	defer cancel()
	pause := time.NewTicker(100 * time.Millisecond)
	defer pause.Stop()
	for {
		rep, err := a.do(outer, r, probe)
		if err != nil {
			return err
		}
		if rep.Error == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %s", context.Cause(ctx), rep.Error)
		case <-pause.C:
		}
	}
}

func (a *agents) close() error {
	var errs []error
	for _, set := range []map[string]*agent{a.clients, a.servers} {
		for _, p := range set {
			if err := p.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
				errs = append(errs, err)
			}
			errs = append(errs, p.proc.Stop())
		}
	}
	return errors.Join(errs...)
}
