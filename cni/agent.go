package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/cni/install"
	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/yamldir"
	"github.com/mistnet/mistnet/internal/zds"
)

// Agent is the node agent. Make it with New.
type Agent struct {
	cfg     Config
	env     *daemon.Env
	log     *zap.Logger
	metrics *metrics
	catalog *catalog
	zds     *zds.Server
	rec     *reconciler
	adopter *adopter
	kube    *kubeSource // nil in files mode
	taints  *tainter    // nil: they are not the agent's business
}

// What the agent must have done to be ready.
const (
	taskPods    = "pods and namespaces"
	taskInstall = "CNI plugin"
)

// New checks what the agent needs of the machine and reads what it remembers. It starts nothing.
func New(c Config, env *daemon.Env) (*Agent, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if !linux.HasCapNetAdmin() {
		return nil, errors.New("CAP_NET_ADMIN is missing: the agent changes the network of pods, run it as root")
	}
	if c.RunDir == "" {
		c.RunDir = plugin.DefaultRunDir
	}
	if c.ZDSSocket == "" {
		c.ZDSSocket = DefaultZtunnelSocket
	}
	for _, dir := range []string{c.RunDir, c.StatusDir} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make directory: %w", err)
		}
	}
	redirect, err := c.redirection()
	if err != nil {
		return nil, err
	}
	if err := redirect.Learn(rules.InPod(rules.Options{DNS: c.Policy.DNS})); err != nil {
		return nil, err
	}
	log := env.Log.Named("cni")
	mode, why := redirect.Mode()
	log.Info("redirecting with", zap.String("mode", string(mode)), zap.String("reason", why))
	known, err := openRecords(filepath.Join(c.RunDir, memoryFile))
	if errors.Is(err, errBrokenRecords) {
		log.Error("known pods forgotten, looking for those that run", zap.Error(err))
	} else if err != nil {
		return nil, err
	}
	a := &Agent{cfg: c, env: env, log: log, catalog: newCatalog(c.Policy, c.Source == SourceKubernetes)}
	a.rec = &reconciler{
		rules: redirect, catalog: a.catalog, records: known, status: statusDir(c.StatusDir), probes: noProbes{}, log: log,
		proc: c.procDir(), repairEvery: c.RepairEvery, releaseGrace: c.ReleaseGrace,
		start: make(chan *pod), slots: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))), pods: make(map[podKey]*pod),
	}
	a.zds = &zds.Server{Path: c.ZDSSocket, Snapshot: a.rec.snapshot, Log: log.Named("zds")}
	a.metrics = newMetrics(env.Registry, a.zds.Connected)
	a.rec.zt = a.zds
	if c.HostProbe {
		var here *linux.NetNS
		h, err := redirect.NewHost(here, hostProbe())
		if err == nil {
			err = h.Keep(captured(known.list()))
		}
		if err != nil {
			return nil, err
		}
		a.rec.probes = h
	}
	if c.Source == SourceKubernetes {
		if err := a.useKubernetes(); err != nil {
			return nil, err
		}
	}
	a.adopter = &adopter{
		catalog: a.catalog, rec: a.rec, status: a.rec.status, proc: a.rec.proc, node: c.Node, log: log, metrics: a.metrics,
		look: make(chan struct{}, 1), trouble: make(map[string]*trouble),
	}
	a.rec.sweeps = append(a.rec.sweeps, a.rec.status.refresh)
	a.rec.restore(known.list())
	env.Ready.Pending(taskPods)
	if c.CNIConfDir != "" {
		env.Ready.Pending(taskInstall)
	}
	return a, nil
}

// redirection is what puts rules into pods.
func (c *Config) redirection() (*apply.Redirection, error) {
	var here *linux.NetNS
	return apply.New(apply.Config{Mode: c.mode(), IPTables: c.IPTables, NFT: c.NFT, Host: here})
}

// captured are the addresses of the pods that are in the mesh, by UID.
func captured(list []record) map[string][]netip.Addr {
	ips := make(map[string][]netip.Addr)
	for _, rec := range list {
		if rec.Captured && !rec.Released {
			ips[rec.UID] = rec.IPs
		}
	}
	return ips
}

// useKubernetes makes the API server the source of pods and the place of announcements.
func (a *Agent) useKubernetes() (err error) {
	client := a.cfg.Client
	if client == nil {
		if client, err = connect(a.cfg.Kubeconfig); err != nil {
			return err
		}
	}
	status := newPodStatus(client, a.catalog, a.log)
	a.kube = &kubeSource{
		status: status, client: client, node: a.cfg.Node, catalog: a.catalog, log: a.log,
		touched: func(k podKey) {
			a.metrics.events.WithLabelValues(eventUpdate).Inc()
			a.rec.wakeOne(k)
			a.adopter.nudge()
		},
		all: func() {
			if a.catalog.isLoaded() {
				a.env.Ready.Done(taskPods)
			}
			a.metrics.events.WithLabelValues(eventUpdate).Inc()
			a.rec.wakeAll()
			a.adopter.nudge()
		},
		owner: &owner{client: client, namespace: a.cfg.Namespace, name: a.cfg.DaemonSet, log: a.log},
	}
	if a.cfg.Untaint != "" {
		a.taints = &tainter{
			client: client, node: a.cfg.Node, key: a.cfg.Untaint, add: a.cfg.Taint, ready: a.env.Ready, log: a.log,
		}
	}
	a.rec.fetch = a.kube.fetch
	a.rec.status = status
	a.rec.sweeps = append(a.rec.sweeps, a.kube.prune)
	return nil
}

// Run works until ctx is done, or something it cannot work without fails. It leaves pods, rules and status as they are.
func (a *Agent) Run(ctx context.Context) error {
	socket, err := listenPlugin(a.cfg.RunDir)
	if err != nil {
		return err
	}
	defer socket.Close()
	var pages net.Listener
	if a.cfg.Listen != "" {
		if pages, err = net.Listen("tcp", a.cfg.Listen); err != nil {
			return fmt.Errorf("listen for metrics: %w", err)
		}
		defer pages.Close()
	}
	// What serves goes on after ctx is done, until it is clear whether the mesh leaves the node.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, serving := errgroup.WithContext(serving)
	stopping, release := context.WithCancel(ctx)
	defer release()
	defer context.AfterFunc(serving, release)() // something failed
	var installing sync.WaitGroup
	if a.cfg.CNIConfDir != "" {
		i, err := a.cfg.installer(a.log.Named("install"))
		if err != nil {
			return err
		}
		i.OnInstall = a.installed
		installing.Add(1)
		g.Go(func() error { defer installing.Done(); return i.Run(stopping) })
	}
	g.Go(func() error { return a.rec.run(serving) })
	g.Go(func() error { return a.zds.Run(serving) })
	g.Go(func() error { return a.adopter.run(stopping) })
	g.Go(func() error { return daemon.ServeHTTP(serving, socket, a.pluginAPI()) })
	if a.kube == nil {
		g.Go(func() error { return yamldir.Watch(serving, a.cfg.ConfigDir, a.onChange) })
	} else {
		g.Go(func() error { return a.kube.run(serving) })
		g.Go(func() error { return a.kube.status.run(serving) })
		if a.taints != nil {
			g.Go(func() error { return a.taints.run(stopping) })
		}
	}
	g.Go(func() error {
		<-stopping.Done()
		defer stop()
		if serving.Err() != nil || a.kube == nil {
			return nil
		}
		installing.Wait()
		return a.leaveIfOrphaned(serving)
	})
	if pages != nil {
		g.Go(func() error { return daemon.ServeHTTP(serving, pages, a.pages()) })
	}
	a.log.Info("agent started", zap.Int("pods", len(a.rec.all())), zap.String("run.dir", a.cfg.RunDir))
	return g.Wait()
}

// installer is what keeps the plugin on the host.
func (c *Config) installer(log *zap.Logger) (*install.Installer, error) {
	entry, err := json.Marshal(map[string]any{
		"type": install.PluginType, "plugin_log_level": "info", "cni_agent_run_dir": c.RunDir,
		"exclude_namespaces": c.Policy.ExcludeNamespaces, "pod_namespace": c.Namespace,
	})
	if err != nil {
		return nil, fmt.Errorf("encode plugin's configuration: %w", err)
	}
	return &install.Installer{BinDir: c.CNIBinDir, ConfDir: c.CNIConfDir, Binary: c.CNIPlugin, Entry: entry, Log: log}, nil
}

// hostProbe lets this machine's probes into enrolled pods.
func hostProbe() rules.Host { return rules.HostProbe(netip.Addr{}, netip.Addr{}) }

// Main runs the agent, or takes its work off the host when the configuration says so.
func Main(ctx context.Context, c Config, env *daemon.Env) error {
	if c.Uninstall {
		return c.uninstall(ctx, env.Log)
	}
	a, err := New(c, env)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

// onChange takes up a change of the watched directory. Broken YAML is reported; what it meant before stays in force.
func (a *Agent) onChange(ch yamldir.Change) {
	for _, p := range ch.Problems {
		a.log.Warn("object refused", zap.String("file", p.File), zap.Int("line", p.Line),
			zap.Stringer("object", p.Key), zap.String("reason", p.Reason))
	}
	touched, all := a.catalog.apply(ch)
	defer a.adopter.nudge()
	a.env.Ready.Done(taskPods)
	if all {
		a.metrics.events.WithLabelValues(eventUpdate).Inc()
		a.rec.wakeAll()
		return
	}
	for _, k := range touched {
		a.metrics.events.WithLabelValues(eventUpdate).Inc()
		a.rec.wakeOne(k)
	}
}

// installed hears how putting the plugin on the host went.
func (a *Agent) installed(err error) {
	a.metrics.install(err)
	if err != nil {
		a.env.Ready.Pending(taskInstall)
		return
	}
	a.env.Ready.Done(taskInstall)
}

func (a *Agent) pages() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", daemon.Metrics(a.env.Registry))
	mux.Handle("GET /readyz", a.env.Ready)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	return mux
}
