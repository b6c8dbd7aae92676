package waypoint_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
	"github.com/mistnet/mistnet/waypoint"
)

// node is the ztunnel of an application's node: at any time one of its instances takes new connections, as in an upgrade.
type node struct {
	l    *lab
	id   mesh.Identity
	now  atomic.Pointer[instance]
	work sync.WaitGroup
}

// instance is one of them.
type instance struct {
	hbone.Server
	tunnels atomic.Int64 // streams it has accepted
}

// tunnelled publishes a service whose one application is reached by HBONE.
func (l *lab) tunnelled(name, vip string, proto mesh.AppProtocol, at netip.AddrPort) *node {
	l.t.Helper()
	n := &node{l: l, id: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name}}
	n.replace()
	ctx, stop := context.WithCancel(context.Background())
	ln := listen(l.t, netip.AddrPortFrom(at.Addr(), mesh.PortHBONE).String())
	n.work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			n.work.Go(func() { _ = n.now.Load().ServeConn(ctx, conn) })
		}
	})
	l.t.Cleanup(func() { stop(); ln.Close(); n.work.Wait() })
	key := "shop/" + name + ".shop.svc.cluster.local"
	l.workloads(&mesh.Workload{
		UID: "Kubernetes//Pod/shop/" + name, Name: name, Namespace: "shop", Addrs: []netip.Addr{at.Addr()}, ServiceAccount: name,
		Protocol: mesh.ProtocolHBONE, Services: []mesh.ServicePorts{{Service: key, Ports: []mesh.Port{{ServicePort: 80, TargetPort: at.Port()}}}},
	})
	l.service(name, vip, proto)
	l.known(name)
	return n
}

// replace has a new instance take what comes from now on, and returns the old one.
func (n *node) replace() (old *instance) {
	i := new(instance)
	i.TLS = identity.ServerConfig(n.l.ca.SVID(n.id))
	i.Handle = func(ctx context.Context, r *hbone.Request) {
		i.tunnels.Add(1)
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", r.Authority)
		if err != nil {
			_ = r.Reject(http.StatusServiceUnavailable)
			return
		}
		s, err := r.Accept("")
		if err != nil {
			conn.Close()
			return
		}
		_ = relay.Pump(ctx, s, conn.(*net.TCPConn), new(relay.Counters))
	}
	return n.now.Swap(i)
}

// TestADrainingTunnel: once the ztunnel of an application's node says that it goes, nothing new is asked through it, whatever was kept
// inside; what is under way ends in order, and then nothing holds it up.
func TestADrainingTunnel(t *testing.T) {
	t.Parallel()
	l := newLab(t, func(c *waypoint.Config) { c.SniffTimeout = 5 * time.Second })
	for i, c := range []struct {
		name   string
		proto  mesh.AppProtocol
		secret bool
	}{
		{"one", mesh.AppHTTP1, false},
		{"two", mesh.AppHTTP2, false},
		{"secret-one", mesh.AppHTTP1, true},
		{"secret-two", mesh.AppHTTP2, true},
	} {
		held, release := make(chan struct{}, 1), make(chan struct{})
		handle := func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/held" {
				w.WriteHeader(http.StatusOK)
				_ = http.NewResponseController(w).Flush()
				held <- struct{}{}
				<-release
			}
			fmt.Fprint(w, r.Proto)
		}
		at := netip.AddrPort{}
		if c.secret {
			srv := httptest.NewUnstartedServer(http.HandlerFunc(handle))
			srv.Listener.Close()
			srv.Listener, srv.EnableHTTP2 = listen(t, loopback()+":0"), true
			srv.StartTLS()
			t.Cleanup(srv.Close)
			at = addrPort(srv.Listener.Addr())
		} else {
			at = app2(t, true, handle)
		}
		vip := fmt.Sprintf("10.9.0.%d", i+1)
		n := l.tunnelled(c.name, vip, c.proto, at)
		if c.secret {
			l.traffic(c.name, mesh.TrafficSettings{TLS: &mesh.UpstreamTLS{Mode: mesh.TLSSimple, InsecureSkipVerify: true}})
		}
		want := map[mesh.AppProtocol]string{mesh.AppHTTP1: "HTTP/1.1", mesh.AppHTTP2: "HTTP/2.0"}[c.proto]
		ask := func(path string) {
			resp, err := l.client.Get("http://" + vip + path)
			if err != nil {
				t.Errorf("%s%s: %v", c.name, path, err)
				return
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 200 || string(body) != want {
				t.Errorf("%s%s: %d %q, %v, want %q", c.name, path, resp.StatusCode, body, err, want)
			}
		}
		var work sync.WaitGroup
		work.Go(func() { ask("/held") })
		<-held
		ask("/")
		ask("/")

		first := n.replace()
		before := first.tunnels.Load()
		down := make(chan error, 1)
		go func() { down <- first.Shutdown(context.Background()) }()
		l.eventually(c.name+": a tunnel to the new ztunnel", func() bool { ask("/"); return n.now.Load().tunnels.Load() > 0 })
		ask("/")
		if after := first.tunnels.Load(); after != before {
			t.Errorf("%s: %d tunnels of the old ztunnel, want %d as before", c.name, after, before)
		}
		if after := n.now.Load().tunnels.Load(); after != 1 {
			t.Errorf("%s: %d tunnels of the new ztunnel, want 1: it is kept", c.name, after)
		}
		close(release)
		work.Wait()
		select {
		case err := <-down:
			if err != nil {
				t.Errorf("%s: the old ztunnel ends with %v", c.name, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: something is kept in the old ztunnel", c.name)
		}
	}
}
