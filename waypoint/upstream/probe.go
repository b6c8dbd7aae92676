package upstream

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/hbone"
	"github.com/mistnet/mistnet/internal/mesh"
)

// maxHealthHead and maxHealthBody bound what is read of an answer.
const (
	maxHealthHead = 64 << 10
	maxHealthBody = 64 << 10
)

// ask asks an endpoint once whether it is well, on a connection of its own that goes the way requests go. The error says why it is
// not.
func (u *Pool) ask(ctx context.Context, a *asked) error {
	err := u.askOnce(ctx, a)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", a.how.Timeout)
	}
	return err
}

func (u *Pool) askOnce(ctx context.Context, a *asked) error {
	protocol := ""
	if a.http2 {
		protocol = "h2"
	}
	conn, err := u.Dial(ctx, a.to, hbone.Header{}, protocol)
	if err == nil && a.how.Protocol == mesh.HealthTCP && a.to.Settings.Tunnel != nil {
		conn, err = AskForward(ctx, conn, a.to.Settings.Tunnel)
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	switch a.how.Protocol {
	case mesh.HealthHTTP:
		return a.askHTTP(ctx, conn)
	case mesh.HealthGRPC:
		return a.askGRPC(ctx, conn)
	case mesh.HealthTCP:
	}
	return nil
}

// askHTTP asks by a GET.
func (a *asked) askHTTP(ctx context.Context, conn net.Conn) error {
	resp, err := a.exchange(ctx, conn, http.MethodGet, a.how.Path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("the answer is %d", resp.StatusCode)
	}
	return nil
}

// askGRPC asks by grpc.health.v1 (the health checking protocol of gRPC).
func (a *asked) askGRPC(ctx context.Context, conn net.Conn) error {
	text, err := proto.Marshal(&grpc_health_v1.HealthCheckRequest{Service: a.how.Service})
	if err != nil {
		return err
	}
	message := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text))), text...) // not compressed, its length
	resp, err := a.exchange(ctx, conn, http.MethodPost, grpc_health_v1.Health_Check_FullMethodName, message)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxHealthBody))
	if err != nil {
		return err
	}
	status := cmp.Or(resp.Header.Get("Grpc-Status"), resp.Trailer.Get("Grpc-Status"))
	switch {
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("the answer is %d", resp.StatusCode)
	case status != "0":
		why := cmp.Or(resp.Header.Get("Grpc-Message"), resp.Trailer.Get("Grpc-Message"))
		return fmt.Errorf("the answer is gRPC status %s %s", cmp.Or(status, "missing"), accesslog.Printable(why))
	case len(body) < 5 || body[0] != 0 || uint32(len(body)-5) != binary.BigEndian.Uint32(body[1:5]):
		return errors.New("the answer is no message of gRPC")
	}
	var answer grpc_health_v1.HealthCheckResponse
	if err := proto.Unmarshal(body[5:], &answer); err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if answer.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("the answer is %s", answer.GetStatus())
	}
	return nil
}

// exchange sends a request on conn; message is the body of one of gRPC. net/http will do: checks are few, and their connections
// carry nothing else.
func (a *asked) exchange(ctx context.Context, conn net.Conn, method, path string, message []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+cmp.Or(a.how.Host, a.service.Hostname)+path, bytes.NewReader(message))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "mistnet-health-check")
	if message != nil {
		req.Header.Set("Content-Type", "application/grpc")
		req.Header.Set("Te", "trailers")
	}
	var protocols http.Protocols
	protocols.SetHTTP1(!a.http2)
	protocols.SetUnencryptedHTTP2(a.http2) // inside of TLS, if there is any
	dial := func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	t := &http.Transport{Protocols: &protocols, DialContext: dial, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHealthHead}
	return t.RoundTrip(req)
}

// serviceName is a service in labels.
type serviceName struct{ namespace, hostname string }

// checkCount is what is counted of one.
type checkCount struct{ passed, failed, failing int64 }

// checkCounts are the metrics of health checks.
type checkCounts struct {
	mu  sync.Mutex
	all map[serviceName]*checkCount

	total, bad *prometheus.Desc
}

func newCheckCounts() checkCounts {
	labels := []string{"destination_service_namespace", "destination_service"}
	return checkCounts{
		all:   make(map[serviceName]*checkCount),
		total: prometheus.NewDesc("mistnet_health_checks_total", "Health checks of endpoints.", append(labels, "result"), nil),
		bad:   prometheus.NewDesc("mistnet_health_check_failing_endpoints", "Endpoints that are out because of health checks.", labels, nil),
	}
}

func (c *checkCounts) of(k *check) *checkCount {
	name := serviceName{k.service.Namespace, k.service.Hostname}
	n := c.all[name]
	if n == nil {
		n = new(checkCount)
		c.all[name] = n
	}
	return n
}

// count counts a check that is over.
func (c *checkCounts) count(k *check, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := c.of(k); err != nil {
		n.failed++
	} else {
		n.passed++
	}
}

// failing counts endpoints that came to be out, or no longer are.
func (c *checkCounts) failing(k *check, by int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(k).failing += by
}

// Describe implements prometheus.Collector.
func (c *checkCounts) Describe(ch chan<- *prometheus.Desc) { ch <- c.total; ch <- c.bad }

// Collect implements prometheus.Collector.
func (c *checkCounts) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, n := range c.all {
		metric := func(d *prometheus.Desc, kind prometheus.ValueType, v int64, result ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, float64(v), append([]string{name.namespace, name.hostname}, result...)...)
		}
		metric(c.total, prometheus.CounterValue, n.passed, "pass")
		metric(c.total, prometheus.CounterValue, n.failed, "fail")
		metric(c.bad, prometheus.GaugeValue, n.failing)
	}
}
