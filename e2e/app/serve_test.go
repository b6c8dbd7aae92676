package app_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/mistnet/mistnet/e2e/app"
)

func TestHealthIsAnsweredByGRPCAsByHTTP(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- app.Main(ctx, []string{"serve", "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	var name, web, echo, calls string
	const says = "%s serves HTTP on %s and echoes on %s and answers calls on %s"
	if _, e := fmt.Sscanf(line, says, &name, &web, &echo, &calls); err != nil || e != nil {
		t.Fatal(line, err, e)
	}
	conn, err := grpc.NewClient(calls, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	expect := func(service string, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		got, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil || got.Status != want {
			t.Errorf("health of %q = %v, %v; want %v", service, got, err, want)
		}
	}
	const yes, no = grpc_health_v1.HealthCheckResponse_SERVING, grpc_health_v1.HealthCheckResponse_NOT_SERVING
	for _, service := range []string{"", "liveness", "readiness"} {
		expect(service, yes)
	}
	if out, err := run(t, "post", "http://"+web+"/readyz", "false"); err != nil {
		t.Fatal(out, err)
	}
	expect("readiness", no)
	expect("liveness", yes)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestDraining: what is told to end goes on for a while; what is told to fail meanwhile fails.
func TestDraining(t *testing.T) {
	t.Setenv("DRAIN", "1h")
	r, w := io.Pipe()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- app.Main(ctx, []string{"serve", "127.0.0.1:0", "127.0.0.1:0"}, w) }()
	line, err := bufio.NewReader(r).ReadString('\n')
	var name, web string
	if _, e := fmt.Sscanf(line, "%s serves HTTP on %s ", &name, &web); err != nil || e != nil {
		t.Fatal(line, err, e)
	}
	stop()
	if out, err := run(t, "get", "http://"+web+"/", "3"); err != nil {
		t.Errorf("while it drains: %q, %v", out, err)
	}
	_, _ = run(t, "post", "http://"+web+"/exit", "")
	if err := <-done; err == nil {
		t.Error("serve that was told to fail ended well")
	}
	t.Setenv("DRAIN", "long")
	if _, err := run(t, "serve", "127.0.0.1:0", "127.0.0.1:0"); err == nil {
		t.Error("DRAIN=long is taken")
	}
}
