package echo

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The one gRPC method: the path in, what the server was asked out, both as text.
const (
	echoService = "mistnet.e2e.Echo"
	echoMethod  = "/" + echoService + "/Echo"
)

// servers are the ports of each kind.
type servers struct{ http, tls, grpc, tcp []string }

func (s servers) run(ctx context.Context) error {
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, port := range s.http {
		web := webServer(hostname)
		on := web.Serve
		if slices.Contains(s.tls, port) {
			web.TLSConfig = certificate
			on = func(ln net.Listener) error { return web.ServeTLS(ln, "", "") }
		}
		g.Go(func() error { return serve(ctx, port, on, func() { web.Close() }) })
	}
	for _, port := range s.grpc {
		rpc := grpcServer(hostname)
		g.Go(func() error { return serve(ctx, port, rpc.Serve, rpc.Stop) })
	}
	for _, port := range s.tcp {
		g.Go(func() error { return serve(ctx, port, serveTCP, func() {}) })
	}
	return g.Wait()
}

// serve returns when ctx is done, or the server fails.
func serve(ctx context.Context, port string, on func(net.Listener) error, stop func()) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", ":"+port)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { stop(); ln.Close() })()
	if err := on(ln); ctx.Err() == nil {
		return fmt.Errorf("serve port %s: %w", port, err)
	}
	return nil
}

// webServer speaks HTTP/1.1 and HTTP/2, in the clear too.
func webServer(hostname string) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Protocols: &protocols, ReadHeaderTimeout: requestTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = io.WriteString(w, asked{
				host: r.Host, method: r.Method, path: r.URL.RequestURI(), protocol: r.Proto,
				headers: r.Header, hostname: hostname, peer: r.RemoteAddr,
			}.text())
		}),
	}
}

func grpcServer(hostname string) *grpc.Server {
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: echoService,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "Echo",
			Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				in := new(wrapperspb.StringValue)
				if err := decode(in); err != nil {
					return nil, err
				}
				a := asked{method: echoMethod, path: in.GetValue(), protocol: "GRPC", hostname: hostname}
				if p, ok := peer.FromContext(ctx); ok {
					a.peer = p.Addr.String()
				}
				a.headers, _ = metadata.FromIncomingContext(ctx)
				if hosts := a.headers[":authority"]; len(hosts) > 0 {
					a.host = hosts[0]
				}
				return wrapperspb.String(a.text()), nil
			},
		}},
	}, nil)
	return s
}

// serveTCP sends back what it gets.
func serveTCP(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() { // ends when its peer does
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

// selfSigned is a certificate for those who do not verify it.
func selfSigned() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"echo"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, nil
}
