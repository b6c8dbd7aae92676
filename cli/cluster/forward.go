package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// maxPage bounds what is read of one admin page.
const maxPage = 512 << 20

// Forward opens a way from a port of this machine's loopback to a port on the loopback of a pod, and returns its
// host:port. It ends with stop.
func (c *Cluster) Forward(ctx context.Context, namespace, pod string, port int) (addr string, stop func(), err error) {
	url := c.Kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(c.Config)
	if err != nil {
		return "", nil, fmt.Errorf("use the kubeconfig: %w", err)
	}
	ws, err := portforward.NewSPDYOverWebsocketDialer(url, c.Config)
	if err != nil {
		return "", nil, fmt.Errorf("use the kubeconfig: %w", err)
	}
	dialer := portforward.NewFallbackDialer(ws, spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url),
		func(err error) bool { return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) })
	var (
		end, ready = make(chan struct{}), make(chan struct{})
		failed     = make(chan error, 1) // one result, read or not
		noise      bytes.Buffer
	)
	f, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, end, ready, io.Discard, &noise)
	if err != nil {
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	go func() { failed <- f.ForwardPorts() }() // ends with stop
	select {
	case <-ready:
	case err := <-failed:
		return "", nil, Explain(fmt.Errorf("forward to port %d of %s/%s: %w", port, namespace, pod, err))
	case <-ctx.Done():
		close(end)
		return "", nil, context.Cause(ctx)
	}
	ports, err := f.GetPorts()
	if err != nil {
		close(end)
		return "", nil, fmt.Errorf("forward to %s/%s: %w", namespace, pod, err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), func() { close(end); <-failed }, nil
}

// PodPage reads an HTTP page that a pod serves on its own loopback.
func (c *Cluster) PodPage(ctx context.Context, namespace, pod string, port int, path string) ([]byte, error) {
	addr, stop, err := c.Forward(ctx, namespace, pod, port)
	if err != nil {
		return nil, err
	}
	defer stop()
	b, err := Page(ctx, "http://"+addr+path)
	if err != nil {
		return nil, fmt.Errorf("read %s of %s/%s: %w", path, namespace, pod, err)
	}
	return b, nil
}

// Page reads an HTTP page, whole.
func Page(ctx context.Context, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("no answer within 30s"))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return nil, Explain(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxPage))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers %s", url, res.Status)
	}
	return b, nil
}
