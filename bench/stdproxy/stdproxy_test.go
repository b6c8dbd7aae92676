package stdproxy_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/mistnet/mistnet/bench/load"
	"github.com/mistnet/mistnet/bench/stdproxy"
)

// free is an address nobody listens on.
func free(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// Both protocols pass, large bodies too, and the proxy ends with its context.
func TestBothProtocolsPass(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 2)
	go func() { served <- load.Serve(ctx, app) }()
	one, two := free(t), free(t)
	go func() { served <- stdproxy.Serve(ctx, app.Addr().String(), one, two) }()
	for _, addr := range []string{one, two} {
		for { // until it listens
			c, err := net.Dial("tcp", addr)
			if err == nil {
				c.Close()
				break
			}
		}
	}
	for _, o := range []load.Order{
		{Kind: load.HTTP1, Conns: 4, Addr: one},
		{Kind: load.HTTP1, Conns: 4, Addr: one, Body: 64 << 10},
		{Kind: load.HTTP2, Conns: 1, Streams: 8, Addr: two},
		{Kind: load.GRPC, Conns: 2, Streams: 1, Addr: two},
	} {
		o.Slice, o.Host, o.Path = 200*time.Millisecond, "app.test", "/"
		if r := load.Run(t.Context(), o); r.Error != "" || r.Ops == 0 {
			t.Errorf("%s, body %d: %+v", o.Kind, o.Body, r)
		}
	}
	cancel()
	for range 2 {
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}
