package kube

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mistnet/mistnet/istiod/gateway"
)

// Clients speak to one API server.
type Clients struct {
	Kube    kubernetes.Interface
	Dynamic dynamic.Interface // for kinds that the API server may not know
}

const (
	callTimeout = 10 * time.Second // of a call that is not a watch
	qps, burst  = 80, 160          // writers reach many namespaces at once
)

// Connect prepares clients for the API server of a kubeconfig file, or, when there is none, of the cluster this
// program runs in. It does not call it yet.
func Connect(kubeconfig, userAgent string) (Clients, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return Clients{}, fmt.Errorf("find the API server: %w", err)
	}
	cfg.UserAgent, cfg.QPS, cfg.Burst = userAgent, qps, burst
	typed := rest.CopyConfig(cfg)
	typed.ContentType = runtime.ContentTypeProtobuf
	typed.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	k, err := kubernetes.NewForConfig(typed)
	if err != nil {
		return Clients{}, fmt.Errorf("prepare to call the API server: %w", err)
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return Clients{}, fmt.Errorf("prepare to call the API server: %w", err)
	}
	return Clients{Kube: k, Dynamic: d}, nil
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	c.Mesh = c.Mesh.WithDefaults()
	c.Namespace = cmp.Or(c.Namespace, c.Mesh.RootNamespace)
	if c.Identity == "" {
		c.Identity, _ = os.Hostname() //nolint:errcheck // the next line deals with it
		c.Identity = cmp.Or(c.Identity, "istiod")
	}
	return c
}

// waypoints is what is known of the mesh besides what was said of waypoints.
func (c Config) waypoints() gateway.Config {
	w := c.Waypoints
	w.Namespace, w.Revision = c.Namespace, c.Revision
	w.ClusterID, w.ClusterDomain, w.TrustDomain = c.Mesh.ClusterID, c.Mesh.ClusterDomain, c.Mesh.TrustDomain
	return w
}

// meshConfigMap is the name of the ConfigMap with the mesh's configuration.
func (c Config) meshConfigMap() string {
	if c.Revision == "" || c.Revision == "default" {
		return "istio"
	}
	return "istio-" + c.Revision
}

// retry calls until there is an answer that a second call would not change, or ctx is done. Each fault is logged once.
func retry(ctx context.Context, log *zap.Logger, what string, call func(context.Context) error, final func(error) bool) error {
	last := ""
	for wait := 500 * time.Millisecond; ; wait = min(wait*2, 15*time.Second) {
		once, cancel := context.WithTimeout(ctx, callTimeout)
		err := call(once)
		cancel()
		if err == nil || final(err) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err.Error() != last {
			last = err.Error()
			log.Warn("the API server refuses or does not answer, trying again", zap.String("wanted", what), zap.Error(err))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
