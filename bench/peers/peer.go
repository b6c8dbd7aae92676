// Package peers puts the contenders of the bench in the path of a connection: other people's proxies as mutual-TLS pairs, our own
// mesh, and nothing at all. It makes the network they run in, their certificates and their configuration, and starts and stops
// their processes. It measures nothing.
//
// At L4 every contender lives in the same place: a client pod and a server pod on two nodes, a proxy in each pod's network namespace,
// and a REDIRECT rule in the client's that sends the application's connection to the first proxy. Only the direct contender uses
// a port that the rule leaves alone.
//
// At L7 a contender is one proxy, in the namespace of the client's node, that the client is told to use; see Site.
package peers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
)

// ErrAbsent says a contender cannot take part because a program it needs is not on this machine. What to install is in the text.
var ErrAbsent = errors.New("not on this machine")

// Pod is a network namespace with an address in it.
type Pod struct {
	NetNS string // path of the namespace
	Addr  netip.Addr
}

// Env is what a contender is given to start in.
type Env struct {
	Client, Server Pod    // two pods of different nodes, known to no mesh
	Node           Pod    // the client's node, where L7 proxies run
	Dir            string // scratch folder for configuration and logs, removed at the end
	Certs          Certs
	Workers        int // threads each proxy process may use
	// EchoPort is where the server pod's load server listens.
	EchoPort uint16
	// EnvoyBin, ZTunnelBin and OursDir name programs and may be empty. OursDir holds our own binaries. Self is this program.
	EnvoyBin, ZTunnelBin, OursDir, Self string
}

// Running is a contender that is up.
type Running struct {
	// Client and Server are the pods that the load runs in: those of Env, unless the contender brought its own.
	Client, Server Pod
	// Addr is what the client connects to; the load server listens on the port Listen.
	Addr   netip.AddrPort
	Listen uint16
	// Sites are where an L7 contender takes which traffic; one that lacks a site has no part in what goes there. nil at L4.
	Sites map[string]Site
	// PIDs are the proxies' processes; their descendants count as theirs.
	PIDs []int
	// Version and Cipher describe what runs.
	Version string
	Cipher  func(context.Context) string
	// Verify, when not nil, is called once traffic has passed, and proves that it went the way it should.
	Verify func(context.Context) error
	// Stop ends everything Start began. It may be called once.
	Stop func() error
}

// The sites of L7 contenders. Each has the filters of an Istio user's Envoy: authorization by one policy that allows, fault injection
// and CORS, where the contender knows such. What they forward keeps its protocol.
const (
	SiteHTTP1    = "http1"    // HTTP/1.1
	SiteHTTP2    = "http2"    // HTTP/2 without TLS, and gRPC
	SiteRoutes   = "routes"   // HTTP/1.1, a thousand rules
	SitePolicies = "policies" // HTTP/1.1, a hundred policies
	SiteHBONE    = "hbone"    // HTTP/1.1 inside HBONE
)

// Site is where and how an L7 contender takes one kind of traffic.
type Site struct {
	Addr netip.AddrPort
	// Path is what to ask for.
	Path string
	// Prelude is what a connection begins with, HBONE how it is made.
	Prelude []byte
	HBONE   *HBONE
	// PIDs are the proxies' processes; nil: those of Running.
	PIDs []int
}

// HBONE is how a client makes a tunnel.
type HBONE struct {
	Authority       string
	Cert, Key, Root string // files
	Local, Expect   string // SPIFFE URIs of both ends
}

// Contender can take part in a run.
type Contender interface {
	// Name is the short name in tables.
	Name() string
	// Start brings the contender up. An error that wraps ErrAbsent means: leave it out, and say so.
	Start(ctx context.Context, env *Env) (*Running, error)
}

// Direct is the path without a proxy: the floor of every cost.
type Direct struct{}

// Name implements Contender.
func (Direct) Name() string { return "direct" }

// Start implements Contender.
func (Direct) Start(_ context.Context, env *Env) (*Running, error) {
	return &Running{
		Client: env.Client, Server: env.Server, Listen: env.EchoPort,
		Addr:    netip.AddrPortFrom(env.Server.Addr, env.EchoPort),
		Sites:   everywhere(netip.AddrPortFrom(env.Server.Addr, env.EchoPort)),
		Version: "no proxy",
		Cipher:  func(context.Context) string { return "none" },
		Stop:    func() error { return nil },
	}, nil
}

// everywhere is the same address for all sites; the path without a proxy knows no tunnels.
func everywhere(addr netip.AddrPort) map[string]Site {
	sites := make(map[string]Site)
	for _, name := range []string{SiteHTTP1, SiteHTTP2, SiteRoutes, SitePolicies, SiteHBONE} {
		sites[name] = Site{Addr: addr, Path: "/"}
	}
	return sites
}

// undoing remembers how to undo what was done.
type undoing struct{ steps []func() error }

func (u *undoing) add(step func() error) { u.steps = append(u.steps, step) }

// all undoes everything, the last thing first.
func (u *undoing) all() error {
	var errs []error
	for i := len(u.steps) - 1; i >= 0; i-- {
		errs = append(errs, u.steps[i]())
	}
	u.steps = nil
	return errors.Join(errs...)
}

// pair starts the two proxies of a mutual-TLS pair: inner in the server's pod, then outer in the client's, then the REDIRECT.
type pair struct {
	name         string
	frontPort    uint16 // what the application connects to on the server's address
	outerPort    uint16 // where REDIRECT sends it
	inner, outer []string
	version      string
	cipher       func(context.Context) string
}

func (p pair) start(ctx context.Context, env *Env) (_ *Running, err error) {
	var undo undoing
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.all())
		}
	}()
	r := &Running{
		Client: env.Client, Server: env.Server, Listen: env.EchoPort, Stop: undo.all,
		Addr:    netip.AddrPortFrom(env.Server.Addr, p.frontPort),
		Version: p.version, Cipher: p.cipher,
	}
	for _, side := range []struct {
		name string
		pod  Pod
		argv []string
	}{{"inner", env.Server, p.inner}, {"outer", env.Client, p.outer}} {
		proc, err := Spawn(ctx, Program{NetNS: side.pod.NetNS, Log: filepath.Join(env.Dir, p.name+"-"+side.name+".log"), Argv: side.argv})
		if err != nil {
			return nil, fmt.Errorf("start %s (%s): %w", p.name, side.name, err)
		}
		undo.add(proc.Stop)
		r.PIDs = append(r.PIDs, proc.PID())
	}
	rule := redirectRule(env.Server.Addr, p.frontPort, p.outerPort)
	if err := inNS(ctx, env.Client.NetNS, append([]string{"iptables", "-w", "-t", "nat", "-A"}, rule...)...); err != nil {
		return nil, err
	}
	undo.add(func() error {
		return inNS(context.WithoutCancel(ctx), env.Client.NetNS, append([]string{"iptables", "-w", "-t", "nat", "-D"}, rule...)...)
	})
	return r, nil
}

func redirectRule(server netip.Addr, from, to uint16) []string {
	return []string{"OUTPUT", "-p", "tcp", "-d", server.String(), "--dport", fmt.Sprint(from), "-j", "REDIRECT", "--to-ports", fmt.Sprint(to)}
}
