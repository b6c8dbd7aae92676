package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/mistnet/mistnet/internal/linux"
)

// talk is a service of both cart pods, behind the waypoint.
const talk = `
apiVersion: v1
kind: Service
metadata: {name: talk, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec:
  clusterIP: 10.96.0.40
  clusterIPs: [10.96.0.40]
  ipFamilies: [IPv4]
  selector: {app: cart}
  ports:
  - {name: grpc, port: 50051, targetPort: 50051, protocol: TCP}
  - {name: http-chat, port: 8090, targetPort: 8090, protocol: TCP}
  - {name: something, port: 8091, targetPort: 8090, protocol: TCP}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: talk, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: talk}]
  action: DENY
  rules:
  - to: [{operation: {paths: [/grpc.health.v1.Health/Watch, /private]}}]
`

// talks starts in a pod a server of gRPC, whose health is how clients know it, and one of WebSockets.
func (w *world) talks(t *testing.T, pod string, is healthpb.HealthCheckResponse_ServingStatus) {
	t.Helper()
	listen := func(port uint16) net.Listener {
		ln, err := w.pods[pod].Namespace.Listen(t.Context(), linux.ListenOptions{Addr: netip.AddrPortFrom(w.pods[pod].ip, port)})
		must(t, "listen in "+pod, err)
		return ln
	}
	srv, state := grpc.NewServer(), health.NewServer()
	state.SetServingStatus("", is)
	healthpb.RegisterHealthServer(srv, state)
	chat := &http.Server{Handler: websocket.Handler(func(c *websocket.Conn) { _, _ = io.Copy(c, c) })}
	grpcAt, chatAt := listen(50051), listen(8090)
	go func() { _ = srv.Serve(grpcAt) }()
	go func() { _ = chat.Serve(chatAt) }()
	t.Cleanup(func() { srv.Stop(); chat.Close() })
}

// TestClientsAtTheWaypoint: curl, grpc-go and a WebSocket client in a pod, that know nothing of the mesh.
func TestClientsAtTheWaypoint(t *testing.T) {
	w := newTestWorld(t)
	ctx := t.Context()
	w.talks(t, "shop/cart-1", healthpb.HealthCheckResponse_SERVING)
	w.talks(t, "shop/cart-2", healthpb.HealthCheckResponse_NOT_SERVING)
	must(t, "write a service", w.writeText("talk.yaml", talk))
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		to, err := netip.ParseAddrPort(addr)
		if err != nil {
			return nil, err
		}
		return w.pods["shop/web"].Namespace.Dial(ctx, linux.DialOptions{Remote: to, Timeout: 5 * time.Second})
	}

	t.Run("curl", func(t *testing.T) {
		if _, err := exec.LookPath("curl"); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal("CI must have curl: tools/deps.sh test")
			}
			t.Skip("curl is not installed: tools/deps.sh test")
		}
		must(t, "write a policy", w.write("admin.yaml", nil))
		for flag, version := range map[string]string{"--http1.1": "1.1", "--http2-prior-knowledge": "2"} {
			for path, want := range map[string]string{"/hello": "200", "/admin/users": "403"} {
				soon(t, "curl "+flag+" "+path, func() error {
					out, err := w.lab.Command(ctx, w.pods["shop/web"].Namespace, "curl", "-sS", "--max-time", "5", flag, "-o", "/dev/null",
						"-w", "%{http_code} %{http_version}", apiURL+path).CombinedOutput()
					if err == nil && string(out) != want+" "+version {
						err = fmt.Errorf("%s, want %s %s", out, want, version)
					}
					return err
				})
			}
		}
	})

	t.Run("grpc-go", func(t *testing.T) {
		cc, err := grpc.NewClient("passthrough:///10.96.0.40:50051", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial))
		must(t, "make a client", err)
		defer cc.Close()
		client := healthpb.NewHealthClient(cc)
		seen := make(map[healthpb.HealthCheckResponse_ServingStatus]int)
		soon(t, "calls of one connection go to both pods", func() error {
			got, err := client.Check(ctx, new(healthpb.HealthCheckRequest))
			if seen[got.GetStatus()]++; err == nil && len(seen) < 2 {
				err = fmt.Errorf("so far: %v", seen)
			}
			return err
		})
		_, err = client.Check(ctx, &healthpb.HealthCheckRequest{Service: "nobody"})
		if status.Code(err) != codes.NotFound {
			t.Errorf("a call that the server refuses = %v, want its own status", err)
		}
		watch, err := client.Watch(ctx, new(healthpb.HealthCheckRequest))
		if err == nil {
			_, err = watch.Recv()
		}
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("a call that a policy denies = %v, want permission denied", err)
		}
	})

	for name, port := range map[string]string{"WebSocket": "8090", "WebSocket to a port of unknown protocol": "8091"} {
		t.Run(name, func(t *testing.T) {
			at := "10.96.0.40:" + port
			open := func(path string) (*websocket.Conn, error) {
				cfg, err := websocket.NewConfig("ws://"+at+path, "http://"+at)
				must(t, "configure", err)
				conn, err := dial(ctx, at)
				if err != nil {
					return nil, err
				}
				_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
				c, err := websocket.NewClient(cfg, conn)
				if err != nil {
					conn.Close()
				}
				return c, err
			}
			var c *websocket.Conn
			soon(t, "open", func() (err error) { c, err = open("/chat"); return err })
			defer c.Close()
			for _, n := range []int{1, 126, 1 << 16} {
				sent, got := strings.Repeat("a", n), ""
				must(t, "send", websocket.Message.Send(c, sent))
				for len(got) < n { // it comes back in pieces
					var part string
					must(t, "receive", websocket.Message.Receive(c, &part))
					got += part
				}
				if got != sent {
					t.Errorf("%d bytes come back as %d others", n, len(got))
				}
			}
			if _, err := open("/private"); err == nil || !strings.Contains(err.Error(), "bad status") {
				t.Errorf("a WebSocket that a policy denies = %v, want another status", err)
			}
		})
	}
}
