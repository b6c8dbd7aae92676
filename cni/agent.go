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

// DefaultZtunnelSocket is where the agent listens for ztunnel.
const DefaultZtunnelSocket = "/var/run/ztunnel/ztunnel.sock"

// Config is the agent's configuration.
type Config struct {
	ConfigDir string // YAML of pods and namespaces, watched
	StatusDir string // where pods' status files go; "" for none
	RunDir    string // the agent's socket and memory; "" means plugin.DefaultRunDir
	ZDSSocket string // "" means DefaultZtunnelSocket
	Listen    string // host:port of metrics and health pages; "" for none
	IPTables  string // the iptables program; "" means iptables on the PATH

	Policy    Policy
	HostProbe bool // let this machine's health checks bypass the mesh (needs ipset)

	// CNIConfDir is the runtime's configuration directory; "" means that somebody else puts the plugin on the host.
	CNIConfDir string
	CNIBinDir  string // the runtime's plugin directory
	CNIPlugin  string // the plugin's binary, copied from here
	Uninstall  bool   // take the plugin off the host instead of running
}

// Register declares the agent's flags.
func (c *Config) Register(fs *daemon.FlagSet) {
	fs.StringVar(&c.ConfigDir, "config-dir", "", "CONFIG_DIR", "directory of YAML with pods and namespaces, watched")
	fs.StringVar(&c.StatusDir, "status-dir", "", "STATUS_DIR", "directory for the status of the node's pods")
	fs.StringVar(&c.RunDir, "run-dir", plugin.DefaultRunDir, "CNI_AGENT_RUN_DIR", "directory of the plugin's socket and the agent's memory")
	fs.StringVar(&c.ZDSSocket, "ztunnel-uds-address", DefaultZtunnelSocket, "ZTUNNEL_UDS_ADDRESS", "socket ztunnel dials")
	fs.StringVar(&c.Listen, "listen", ":15014", "MONITORING_ADDRESS", "address of /metrics, /healthz and /readyz")
	fs.StringVar(&c.IPTables, "iptables", "", "IPTABLES", "iptables program; its neighbour ip6tables is used for IPv6")
	fs.BoolVar(&c.Policy.DNS, "dns-capture", false, "AMBIENT_DNS_CAPTURE", "capture DNS of enrolled pods")
	fs.BoolVar(&c.HostProbe, "host-probe", false, "HOST_PROBE", "let health checks from this machine bypass the mesh")
	fs.StringVar(&c.CNIConfDir, "cni-conf-dir", "", "CNI_CONF_DIR",
		"put the plugin into the chain in this directory, usually /etc/cni/net.d; empty: leave the host alone")
	fs.StringVar(&c.CNIBinDir, "cni-bin-dir", "/opt/cni/bin", "CNI_BIN_DIR", "where the runtime looks for plugins")
	fs.StringVar(&c.CNIPlugin, "cni-plugin", "", "CNI_PLUGIN", "the plugin's binary, to be copied to the host")
	fs.BoolVar(&c.Uninstall, "uninstall", false, "", "take the plugin, and with -host-probe the host's rules, off the host and exit")
	c.Policy.ExcludeNamespaces = []string{"kube-system"}
	fs.ListVar(&c.Policy.ExcludeNamespaces, "exclude-namespaces", "EXCLUDE_NAMESPACES",
		"namespaces whose pods are never enrolled (default kube-system)")
}

// Validate reports every fault of the configuration.
func (c *Config) Validate() error {
	var errs []error
	if c.ConfigDir == "" && !c.Uninstall {
		errs = append(errs, errors.New("-config-dir is required: the directory with the YAML of pods and namespaces"))
	}
	if c.CNIConfDir != "" && (c.CNIBinDir == "" || c.CNIPlugin == "" && !c.Uninstall) {
		errs = append(errs, errors.New("-cni-conf-dir needs -cni-bin-dir and -cni-plugin too"))
	}
	if c.Uninstall && c.CNIConfDir == "" {
		errs = append(errs, errors.New("-uninstall needs -cni-conf-dir: where the plugin was put"))
	}
	if c.Listen != "" {
		if _, _, err := net.SplitHostPort(c.Listen); err != nil {
			errs = append(errs, fmt.Errorf("-listen: want host:port: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Agent is the node agent. Make it with New.
type Agent struct {
	cfg     Config
	env     *daemon.Env
	log     *zap.Logger
	metrics *metrics
	catalog *catalog
	zds     *zds.Server
	rec     *reconciler
}

const taskPods = "pods and namespaces"

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
	ipt, err := apply.NewIPTables(c.IPTables)
	if err != nil {
		return nil, err
	}
	log := env.Log.Named("cni")
	known, err := openRecords(filepath.Join(c.RunDir, "pods.json"))
	if errors.Is(err, errBrokenRecords) {
		log.Error("known pods forgotten, those that are enrolled lose their traffic until they are restarted", zap.Error(err))
	} else if err != nil {
		return nil, err
	}
	a := &Agent{cfg: c, env: env, log: log, catalog: newCatalog(c.Policy)}
	a.rec = &reconciler{
		rules: ipt, catalog: a.catalog, records: known, status: statusDir(c.StatusDir), probes: noProbes{}, log: log,
		start: make(chan *pod), slots: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))), pods: make(map[podKey]*pod),
	}
	a.zds = &zds.Server{Path: c.ZDSSocket, Snapshot: a.rec.snapshot, Log: log.Named("zds")}
	a.metrics = newMetrics(env.Registry, a.zds.Connected)
	a.rec.zt = a.zds
	if c.HostProbe {
		if a.rec.probes, err = hostProbe(ipt); err != nil {
			return nil, err
		}
	}
	a.rec.restore(known.list())
	env.Ready.Pending(taskPods)
	return a, nil
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
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.rec.run(ctx) })
	g.Go(func() error { return a.zds.Run(ctx) })
	g.Go(func() error { return daemon.ServeHTTP(ctx, socket, a.pluginAPI()) })
	g.Go(func() error { return yamldir.Watch(ctx, a.cfg.ConfigDir, a.onChange) })
	if a.cfg.CNIConfDir != "" {
		i, err := a.cfg.installer(a.log.Named("install"))
		if err != nil {
			return err
		}
		i.OnInstall = a.metrics.install
		g.Go(func() error { return i.Run(ctx) })
	}
	if pages != nil {
		g.Go(func() error { return daemon.ServeHTTP(ctx, pages, a.pages()) })
	}
	a.log.Info("agent started", zap.Int("pods", len(a.rec.all())), zap.String("run.dir", a.cfg.RunDir))
	return g.Wait()
}

// installer is what keeps the plugin on the host.
func (c *Config) installer(log *zap.Logger) (*install.Installer, error) {
	entry, err := json.Marshal(map[string]any{
		"type": install.PluginType, "plugin_log_level": "info", "cni_agent_run_dir": c.RunDir,
		"exclude_namespaces": c.Policy.ExcludeNamespaces, "pod_namespace": os.Getenv("POD_NAMESPACE"),
	})
	if err != nil {
		return nil, fmt.Errorf("encode plugin's configuration: %w", err)
	}
	return &install.Installer{BinDir: c.CNIBinDir, ConfDir: c.CNIConfDir, Binary: c.CNIPlugin, Entry: entry, Log: log}, nil
}

// hostProbe lets this machine's probes into enrolled pods.
func hostProbe(ipt *apply.IPTables) (*apply.Host, error) {
	var here *linux.NetNS
	return apply.NewHost(ipt, here, rules.HostProbe(netip.Addr{}, netip.Addr{}))
}

// Main runs the agent, or takes its plugin off the host when the configuration says so.
func Main(ctx context.Context, c Config, env *daemon.Env) error {
	if c.Uninstall {
		i, err := c.installer(env.Log)
		if err != nil {
			return err
		}
		if err := i.Uninstall(); err != nil || !c.HostProbe {
			return err
		}
		ipt, err := apply.NewIPTables(c.IPTables)
		if err != nil {
			return err
		}
		h, err := hostProbe(ipt)
		if err != nil {
			return err
		}
		return h.Remove()
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

func (a *Agent) pages() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", daemon.Metrics(a.env.Registry))
	mux.Handle("GET /readyz", a.env.Ready)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	return mux
}
