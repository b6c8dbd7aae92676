// Package cluster is how mistctl reaches a Kubernetes cluster: which one, with what clients, and what went wrong when it
// does not work, in a line that says how to fix it. It knows nothing of the mesh.
package cluster

import (
	"cmp"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
)

// Options say which cluster, as kubectl's flags of the same names do.
type Options struct {
	Kubeconfig string
	Context    string
	Namespace  string // of the mesh's control plane
}

// Bind adds the flags of o.
func (o *Options) Bind(f *pflag.FlagSet) {
	f.StringVarP(&o.Kubeconfig, "kubeconfig", "c", "", "kubeconfig file (default: $KUBECONFIG, then ~/.kube/config, then the pod's own account)")
	f.StringVar(&o.Context, "context", "", "context of the kubeconfig (default: its current one)")
	f.StringVarP(&o.Namespace, "istio-namespace", "i", "istio-system", "namespace of the control plane")
}

// Mapper finds the resource of a kind, and forgets what it knew when kinds were added.
type Mapper interface {
	meta.RESTMapper
	Reset()
}

// Cluster is a Kubernetes API server and the clients for it.
type Cluster struct {
	Config    *rest.Config
	Kube      kubernetes.Interface
	Dynamic   dynamic.Interface
	Mapper    Mapper
	Namespace string        // of the control plane
	Current   string        // the namespace that the kubeconfig's context is in
	Version   *version.Info // of the API server
}

// Connect makes clients and asks the API server for its version: a cluster that is returned has answered once.
func Connect(o Options) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.WarnIfAllMissing = false
	if o.Kubeconfig != "" {
		if _, err := os.Stat(o.Kubeconfig); err != nil {
			return nil, fmt.Errorf("read --kubeconfig: %w", err)
		}
		rules.ExplicitPath = o.Kubeconfig
	}
	file := cmp.Or(o.Kubeconfig, os.Getenv("KUBECONFIG"), clientcmd.RecommendedHomeFile)
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: o.Context})
	raw, err := loader.RawConfig()
	if err != nil {
		return nil, explainConfig(err, file)
	}
	if _, ok := raw.Contexts[o.Context]; !ok && o.Context != "" {
		return nil, &Hint{fmt.Errorf("the kubeconfig has no context %q", o.Context), "list them with: kubectl config get-contexts"}
	}
	cfg, err := loader.ClientConfig()
	if err != nil {
		return nil, explainConfig(err, file)
	}
	cfg.QPS, cfg.Burst = 100, 200
	cfg.UserAgent = "mistctl"
	cfg.ContentType = "application/json" // what is read and written once need not be small, but should be readable in a trace
	cfg.WarningHandler = rest.NoWarnings{}
	c, err := New(cfg, o.Namespace)
	if err != nil {
		return nil, err
	}
	if c.Current, _, err = loader.Namespace(); err != nil {
		return nil, explainConfig(err, file)
	}
	short := rest.CopyConfig(cfg)
	short.Timeout = 15 * time.Second
	d, err := discovery.NewDiscoveryClientForConfig(short)
	if err != nil {
		return nil, fmt.Errorf("use the kubeconfig: %w", err)
	}
	if c.Version, err = d.ServerVersion(); err != nil {
		return nil, Explain(fmt.Errorf("ask %s for its version: %w", cfg.Host, err))
	}
	return c, nil
}

// New makes the clients of an API server without asking it anything.
func New(cfg *rest.Config, namespace string) (*Cluster, error) {
	client, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("use the kubeconfig's credentials: %w", err)
	}
	c := &Cluster{Config: cfg, Namespace: namespace}
	return c, c.clients(client)
}

func (c *Cluster) clients(client *http.Client) error {
	kube, err := kubernetes.NewForConfigAndClient(c.Config, client)
	if err != nil {
		return fmt.Errorf("use the kubeconfig: %w", err)
	}
	if c.Dynamic, err = dynamic.NewForConfigAndClient(c.Config, client); err != nil {
		return fmt.Errorf("use the kubeconfig: %w", err)
	}
	c.Kube = kube
	c.Mapper = restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(kube.Discovery()))
	return nil
}
