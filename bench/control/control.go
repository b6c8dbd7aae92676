// Package control is the control plane of the bench's waypoints: it publishes a mesh that does not change and signs certificates.
// It decides nothing and reads no YAML; istiod does, and is measured elsewhere.
package control

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/mistnet/mistnet/internal/xds"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/token"
)

// ServerName is the name in the control plane's certificate.
const ServerName = "istiod.istio-system.svc"

// Ready is the line it prints once it listens.
const Ready = "ready"

// Main is the command line: it serves until in ends.
func Main(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	fs := flag.NewFlagSet("control", flag.ContinueOnError)
	dir := fs.String("dir", "", "folder of the authority's and the tokens' keys")
	listen := fs.String("listen", "", "address to listen on")
	client := fs.String("client", "", "address of the client's pod")
	plain, guarded := fs.String("plain", "", "address of the waypoint plain"), fs.String("guarded", "", "address of the waypoint guarded")
	server := fs.String("server", "", "address and port of the server")
	if err := fs.Parse(args); err != nil {
		return err
	}
	at := Places{Waypoints: make(map[string]netip.Addr)}
	var err error
	if at.Server, err = netip.ParseAddrPort(*server); err != nil {
		return fmt.Errorf("-server: %w", err)
	}
	if at.Client, err = netip.ParseAddr(*client); err != nil {
		return fmt.Errorf("-client: %w", err)
	}
	for gateway, addr := range map[string]string{Plain: *plain, Guarded: *guarded} {
		if at.Waypoints[gateway], err = netip.ParseAddr(addr); err != nil {
			return fmt.Errorf("-%s: %w", gateway, err)
		}
	}
	return serve(ctx, *dir, *listen, at, in, out)
}

func serve(ctx context.Context, dir, listen string, at Places, in io.Reader, out io.Writer) error {
	changes, err := Changes(at)
	if err != nil {
		return err
	}
	authority, err := ca.Open(ca.Config{Dir: dir})
	if err != nil {
		return err
	}
	issuer, err := token.OpenIssuer(dir)
	if err != nil {
		return err
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	srv := grpc.NewServer(append(xds.ServerOptions(), grpc.Creds(credentials.NewTLS(authority.ServingConfig([]string{ServerName}, nil))))...)
	resources := xds.NewServer(xds.ServerConfig{Authenticate: func(context.Context) (string, error) { return "waypoint", nil }})
	resources.Register(srv)
	authority.Register(srv, ca.ServiceConfig{Verifier: issuer})
	resources.PublishAll(changes)
	served := make(chan error, 1) // one goroutine, one result
	go func() { served <- srv.Serve(ln) }()
	if _, err := fmt.Fprintln(out, Ready); err != nil {
		return err
	}
	// The parent holds the other end of in: when it is gone, for whatever reason, so are we.
	_, _ = io.Copy(io.Discard, in)
	resources.Stop()
	srv.Stop()
	if err := <-served; !errors.Is(err, grpc.ErrServerStopped) { // which it says when it was stopped before it began
		return err
	}
	return nil
}
