package cni

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
)

// DefaultZtunnelSocket is where the agent listens for ztunnel.
const DefaultZtunnelSocket = "/var/run/ztunnel/ztunnel.sock"

// Sources of pods and namespaces.
const (
	SourceFiles      = "files"      // a watched directory
	SourceKubernetes = "kubernetes" // the API server
)

// Config is the agent's configuration.
type Config struct {
	Source string // SourceFiles or SourceKubernetes; "" means files

	ConfigDir string // files: YAML of pods and namespaces, watched
	StatusDir string // files: where pods' status files go; "" for none

	Kubeconfig string               // kubernetes: "" means the cluster the agent runs in
	Client     kubernetes.Interface // kubernetes: nil means made of Kubeconfig
	Namespace  string               // kubernetes: the agent's own; "" means mesh.RootNamespace
	DaemonSet  string               // kubernetes: whose deletion means uninstallation; "" means DefaultDaemonSet
	Untaint    string               // kubernetes: the taint to take off the node when ready; "" for none
	Taint      bool                 // kubernetes: put it on when not ready

	Node      string // the node's name; required with kubernetes
	RunDir    string // the agent's socket and memory; "" means plugin.DefaultRunDir
	ZDSSocket string // "" means DefaultZtunnelSocket
	Listen    string // host:port of metrics and health pages; "" for none
	NFTables  string // whether redirection is made with nftables: "true", "false", or "auto" (or ""), which looks
	IPTables  string // the iptables program; "" means iptables on the PATH
	NFT       string // the nft program; "" means nft on the PATH
	ProcDir   string // where the host's processes are seen; "" means /host/proc if it is there, else /proc

	Policy    Policy
	HostProbe bool // let this machine's health checks bypass the mesh (needs ipset)
	// ReleaseGrace is how long ztunnel goes on serving a pod that left the mesh, at least: peers send it HBONE until they
	// have heard.
	ReleaseGrace time.Duration
	RepairEvery  time.Duration // how often the rules in pods are checked; 0: only at the start

	// CNIConfDir is the runtime's configuration directory; "" means that somebody else puts the plugin on the host.
	CNIConfDir string
	CNIBinDir  string // the runtime's plugin directory
	CNIPlugin  string // the plugin's binary, copied from here
	Uninstall  bool   // take everything off the host instead of running
}

// Register declares the agent's flags.
func (c *Config) Register(fs *daemon.FlagSet) {
	source := SourceFiles
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		source = SourceKubernetes
	}
	fs.StringVar(&c.Source, "source", source, "SOURCE", "where pods and namespaces come from: kubernetes or files")
	fs.StringVar(&c.ConfigDir, "config-dir", "", "CONFIG_DIR", "directory of YAML with pods and namespaces, watched (-source=files)")
	fs.StringVar(&c.StatusDir, "status-dir", "", "STATUS_DIR", "directory for the status of the node's pods (-source=files)")
	fs.StringVar(&c.Kubeconfig, "kubeconfig", "", "KUBECONFIG", "how to reach the API server; empty: as a pod does")
	fs.StringVar(&c.Node, "node", "", "NODE_NAME", "name of the node")
	fs.StringVar(&c.Namespace, "pod-namespace", mesh.RootNamespace, "POD_NAMESPACE", "the agent's own namespace")
	fs.StringVar(&c.DaemonSet, "daemonset", DefaultDaemonSet, "DAEMONSET_NAME",
		"the agent's own DaemonSet: when the agent stops and it is gone, the node is cleaned up")
	fs.StringVar(&c.Untaint, "untaint", "", "UNTAINT", "take this taint off the node when the agent is ready, usually "+DefaultTaint)
	fs.BoolVar(&c.Taint, "taint", false, "TAINT", "put the taint of -untaint on the node while the agent is not ready, and when it stops")
	fs.StringVar(&c.RunDir, "run-dir", plugin.DefaultRunDir, "CNI_AGENT_RUN_DIR", "directory of the plugin's socket and the agent's memory")
	fs.StringVar(&c.ZDSSocket, "ztunnel-uds-address", DefaultZtunnelSocket, "ZTUNNEL_UDS_ADDRESS", "socket ztunnel dials")
	fs.StringVar(&c.Listen, "listen", ":15014", "MONITORING_ADDRESS", "address of /metrics, /healthz and /readyz")
	fs.StringVar(&c.NFTables, "native-nftables", nativeAuto, "NATIVE_NFTABLES",
		"make redirection with nftables: true, false, or auto, which uses it where iptables does not work or kube-proxy uses it")
	fs.StringVar(&c.NFT, "nft", "", "NFT", "nft program")
	fs.StringVar(&c.IPTables, "iptables", "", "IPTABLES", "iptables program; its neighbour ip6tables is used for IPv6")
	fs.StringVar(&c.ProcDir, "proc-dir", "", "HOST_PROC", "where the host's processes are seen; empty: /host/proc if it is there, else /proc")
	fs.BoolVar(&c.Policy.DNS, "dns-capture", false, "AMBIENT_DNS_CAPTURE", "capture DNS of enrolled pods")
	fs.BoolVar(&c.HostProbe, "host-probe", source == SourceKubernetes, "HOST_PROBE", "let health checks from this machine bypass the mesh")
	fs.DurationVar(&c.ReleaseGrace, "release-grace", 10*time.Second, "RELEASE_GRACE",
		"how long ztunnel goes on serving a pod that left the mesh, at least; connections it has are waited for as long as they last")
	fs.DurationVar(&c.RepairEvery, "repair-every", time.Minute, "REPAIR_EVERY", "how often the rules in pods are checked; 0: only at the start")
	fs.StringVar(&c.CNIConfDir, "cni-conf-dir", "", "CNI_CONF_DIR",
		"put the plugin into the chain in this directory, usually /etc/cni/net.d; empty: leave the host alone")
	fs.StringVar(&c.CNIBinDir, "cni-bin-dir", "/opt/cni/bin", "CNI_BIN_DIR", "where the runtime looks for plugins")
	fs.StringVar(&c.CNIPlugin, "cni-plugin", "", "CNI_PLUGIN", "the plugin's binary, to be copied to the host")
	fs.BoolVar(&c.Uninstall, "uninstall", false, "", "take the plugin, the rules in running pods and, with -host-probe, the host's rules away and exit")
	c.Policy.ExcludeNamespaces = []string{"kube-system"}
	fs.ListVar(&c.Policy.ExcludeNamespaces, "exclude-namespaces", "EXCLUDE_NAMESPACES",
		"namespaces whose pods are never enrolled (default kube-system)")
}

// Validate reports every fault of the configuration.
func (c *Config) Validate() error {
	var errs []error
	switch c.Source {
	case SourceFiles, "":
		if c.ConfigDir == "" && !c.Uninstall {
			errs = append(errs, errors.New("-config-dir is required with -source=files: the directory with the YAML of pods and namespaces"))
		}
	case SourceKubernetes:
		if c.Node == "" {
			errs = append(errs, errors.New("-node (or NODE_NAME) is required with -source=kubernetes: the name of the node this agent serves"))
		}
		if c.ConfigDir != "" || c.StatusDir != "" {
			errs = append(errs, errors.New("-config-dir and -status-dir mean nothing with -source=kubernetes: remove them, or set -source=files"))
		}
	default:
		errs = append(errs, fmt.Errorf("-source=%s: want %s or %s", c.Source, SourceKubernetes, SourceFiles))
	}
	if c.Taint && c.Untaint == "" {
		errs = append(errs, errors.New("-taint needs -untaint: which taint to put on and take off"))
	}
	if c.mode() == "" {
		errs = append(errs, fmt.Errorf("-native-nftables=%s: want true, false or auto", c.NFTables))
	}
	if c.RepairEvery < 0 || c.RepairEvery > 0 && c.RepairEvery < time.Second {
		errs = append(errs, fmt.Errorf("-repair-every=%v: want 0 or at least 1s", c.RepairEvery))
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

const nativeAuto = "auto"

// mode is what NFTables means; "" for nothing.
func (c *Config) mode() apply.Mode {
	switch c.NFTables {
	case nativeAuto, "":
		return apply.ModeAuto
	case "true":
		return apply.ModeNFTables
	case "false":
		return apply.ModeIPTables
	}
	return ""
}

// procDir is where the host's processes are seen.
func (c *Config) procDir() procDir {
	const mounted = "/host/proc"
	if c.ProcDir != "" {
		return procDir(c.ProcDir)
	}
	if _, err := os.Stat(mounted + "/1"); err == nil {
		return mounted
	}
	return "/proc"
}
