package peers

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mistnet/mistnet/bench/control"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/token"
)

// Waypoint is our waypoint, with a control plane that tells it of one server. One process has one policy, another a hundred.
type Waypoint struct{}

// Name implements Contender.
func (Waypoint) Name() string { return "ours" }

// The ports of our waypoints, on the client's node.
const (
	waypointXDS = 15312
	waypointOne = 15320 // and the nine after it
	waypointTwo = 15330
)

// What a waypoint's ports are, counted from its first.
const (
	portHBONE = iota
	portProxy
	portAdmin
	portMetrics
	portReady
)

// Start implements Contender.
func (Waypoint) Start(ctx context.Context, env *Env) (_ *Running, err error) {
	bin := filepath.Join(env.OursDir, "waypoint")
	if _, err := os.Stat(bin); err != nil {
		return nil, fmt.Errorf("%s: %w (make build, or -bin DIR)", bin, ErrAbsent)
	}
	var undo undoing
	defer func() {
		if err != nil {
			err = errors.Join(err, undo.all())
		}
	}()
	w := waypointFiles{dir: filepath.Join(env.Dir, "waypoint")}
	if err := w.prepare(ctx); err != nil {
		return nil, err
	}
	if err := startControl(env, w.dir, &undo); err != nil {
		return nil, err
	}
	r := &Running{
		Client: env.Client, Server: env.Server, Listen: env.EchoPort, Version: describe(ctx, bin), Stop: undo.all,
		Cipher: func(context.Context) string { return "two ends in Go on AES hardware agree on " + suite },
		Sites:  make(map[string]Site),
	}
	pids := make(map[string][]int)
	for _, gateway := range []string{control.Plain, control.Guarded} {
		proc, err := Spawn(ctx, Program{
			NetNS: env.Node.NetNS, Dir: w.dir, Log: filepath.Join(env.Dir, "waypoint-"+gateway+".log"),
			Env: []string{fmt.Sprintf("GOMAXPROCS=%d", env.Workers)}, Argv: append([]string{bin}, waypointArgs(env, &w, gateway)...),
		})
		if err != nil {
			return nil, fmt.Errorf("start waypoint %s: %w", gateway, err)
		}
		undo.add(proc.Stop)
		pids[gateway] = []int{proc.PID()}
	}
	r.PIDs = pids[control.Plain]
	for name, s := range map[string]*control.Service{
		SiteHTTP1: &control.One, SiteHTTP2: &control.Two, SiteRoutes: &control.Thousand, SitePolicies: &control.Checked,
	} {
		r.Sites[name] = Site{
			Addr: netip.AddrPortFrom(env.Node.Addr, firstPort(s.Gateway)+portProxy), Path: s.Path(), PIDs: pids[s.Gateway],
			Prelude: ProxyHeader(netip.AddrPortFrom(env.Client.Addr, 4711), s.VIP, control.Identity("client").String()),
		}
	}
	r.Sites[SiteHBONE] = Site{
		Addr: netip.AddrPortFrom(env.Node.Addr, firstPort(control.Plain)+portHBONE), Path: control.One.Path(),
		HBONE: &HBONE{
			Authority: control.One.VIP.String(), Cert: w.file("client.pem"), Key: w.file("client.key"), Root: w.file("root.pem"),
			Local: control.Identity("client").String(), Expect: control.Identity(control.Plain).String(),
		},
	}
	return r, nil
}

func firstPort(gateway string) uint16 {
	if gateway == control.Guarded {
		return waypointTwo
	}
	return waypointOne
}

// waypointArgs are a waypoint's flags. Access logs are off, as they are for all contenders.
func waypointArgs(env *Env, w *waypointFiles, gateway string) []string {
	first := firstPort(gateway)
	at := func(port uint16) string { return netip.AddrPortFrom(env.Node.Addr, first+port).String() }
	return []string{
		"-gateway=" + gateway, "-namespace=" + control.Namespace, "-pod-name=" + control.Pod(gateway), "-instance-ip=" + env.Node.Addr.String(),
		"-xds-address=https://" + netip.AddrPortFrom(env.Node.Addr, waypointXDS).String(), "-alt-xds-hostname=" + control.ServerName,
		"-alt-ca-hostname=" + control.ServerName, "-xds-root-ca=" + w.file("root.pem"), "-auth-token=" + w.file(gateway+".token"),
		"-listen-addr=" + at(portHBONE), "-proxy-addr=" + at(portProxy), "-admin-addr=" + at(portAdmin), "-metrics-addr=" + at(portMetrics),
		"-ready-addr=" + at(portReady), "-access-log=false", "-drain-delay=0s", "-grace=1s",
	}
}

// startControl starts the control plane and waits until it listens.
func startControl(env *Env, dir string, undo *undoing) error {
	proc, in, out, err := Talk(env.Node.NetNS, filepath.Join(env.Dir, "control.log"), env.Self, "control", "-dir", dir,
		"-listen", netip.AddrPortFrom(env.Node.Addr, waypointXDS).String(), "-client", env.Client.Addr.String(),
		"-server", netip.AddrPortFrom(env.Server.Addr, env.EchoPort).String(),
		"-plain", env.Node.Addr.String(), "-guarded", env.Node.Addr.Next().Next().String()) // nobody has the second: it only must differ
	if err != nil {
		return err
	}
	undo.add(func() error { return errors.Join(in.Close(), proc.Stop()) })
	line, err := bufio.NewReader(out).ReadString('\n')
	if strings.TrimSpace(line) != control.Ready {
		return fmt.Errorf("control plane said %q, want %q: %w", line, control.Ready, errors.Join(err, proc.Exited()))
	}
	return nil
}

// waypointFiles is the folder of the authority's key and what it has signed.
type waypointFiles struct{ dir string }

func (w *waypointFiles) file(name string) string { return filepath.Join(w.dir, name) }

// prepare makes the authority, the waypoints' tokens, and a certificate for the client.
func (w *waypointFiles) prepare(ctx context.Context) error {
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	authority, err := ca.Open(ca.Config{Dir: w.dir})
	if err != nil {
		return err
	}
	issuer, err := token.OpenIssuer(w.dir)
	if err != nil {
		return err
	}
	files := map[string][]byte{"root.pem": authority.RootPEM()}
	for _, gateway := range []string{control.Plain, control.Guarded} {
		raw, err := issuer.Issue(token.Caller{
			Namespace: control.Namespace, ServiceAccount: gateway, Pod: control.Pod(gateway), PodUID: "uid-" + gateway, Node: "n1",
		}, 24*time.Hour)
		if err != nil {
			return err
		}
		files[gateway+".token"] = []byte(raw)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := identity.NewCSR(control.Identity("client"), key)
	if err != nil {
		return err
	}
	chain, err := authority.Sign(ctx, control.Identity("client"), csr, 24*time.Hour)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	files["client.pem"], files["client.key"] = []byte(strings.Join(chain, "")), pemBlock("PRIVATE KEY", der)
	for name, text := range files {
		if err := os.WriteFile(w.file(name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// ProxyHeader is what a ztunnel writes before a connection that it hands over in plaintext: a PROXY header of version 2 with the
// client's identity.
func ProxyHeader(from, to netip.AddrPort, identity string) []byte {
	const tcp4, identityField = 0x11, 0xD0
	body := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	body = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(body, from.Port()), to.Port())
	body = binary.BigEndian.AppendUint16(append(body, identityField), uint16(len(identity)))
	body = append(body, identity...)
	head := append([]byte("\r\n\r\n\x00\r\nQUIT\n"), 0x21, tcp4)
	return append(binary.BigEndian.AppendUint16(head, uint16(len(body))), body...)
}
