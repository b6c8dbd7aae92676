package plugin

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Conf is the plugin's entry in a network configuration list. The keys are the ones Istio's plugin has, so that either
// reads the other's entry; those that concern the agent or Kubernetes access (enablement_selectors, native_nftables,
// enable_ambient_detection_retry) are accepted and mean nothing here.
type Conf struct {
	types.PluginConf

	LogLevel          string   `json:"plugin_log_level"`   // debug, info, warn or error; "" means info
	RunDir            string   `json:"cni_agent_run_dir"`  // "" means DefaultRunDir
	AmbientEnabled    *bool    `json:"ambient_enabled"`    // absent means true
	ExcludeNamespaces []string `json:"exclude_namespaces"` // absent means kube-system
	AgentNamespace    string   `json:"pod_namespace"`      // where the agent's own pods live

	LogFile string `json:"log_file"` // ours: "" means istio-cni.log in the run directory

	rawPrevResult json.RawMessage
}

// agentPods is how the names of the agent's own pods begin. They must start while no agent answers.
const agentPods = "istio-cni-node-"

// parseConf reads the plugin's configuration. The previous result is parsed when there is one.
func parseConf(stdin []byte) (*Conf, error) {
	var c Conf
	var raw struct {
		PrevResult json.RawMessage `json:"prevResult"`
	}
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read network configuration: "+err.Error(), "")
	}
	if err := json.Unmarshal(stdin, &raw); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read network configuration: "+err.Error(), "")
	}
	c.rawPrevResult = raw.PrevResult
	if c.RunDir == "" {
		c.RunDir = DefaultRunDir
	}
	if c.LogFile == "" {
		c.LogFile = filepath.Join(c.RunDir, "istio-cni.log")
	}
	if c.ExcludeNamespaces == nil {
		c.ExcludeNamespaces = []string{"kube-system"}
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "read prevResult: "+err.Error(), "")
	}
	return &c, nil
}

func (c *Conf) socket() string { return filepath.Join(c.RunDir, SocketName) }

// skips says why a pod is none of the agent's business, or "".
func (c *Conf) skips(pod podArgs) string {
	switch {
	case c.AmbientEnabled != nil && !*c.AmbientEnabled:
		return "ambient mode is off"
	case pod.namespace == "" && pod.name == "":
		return "not a pod"
	case slices.Contains(c.ExcludeNamespaces, pod.namespace):
		return "namespace is excluded"
	case c.AgentNamespace == pod.namespace && strings.HasPrefix(pod.name, agentPods):
		return "pod of the agent itself"
	}
	return ""
}

// result is the previous result as this plugin's own: byte for byte, unless the chain changes the version on the way.
func (c *Conf) result() ([]byte, error) {
	var v struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(c.rawPrevResult, &v); err == nil && v.CNIVersion == c.CNIVersion {
		return c.rawPrevResult, nil
	}
	r, err := c.PrevResult.GetAsVersion(c.CNIVersion)
	if err != nil {
		return nil, fmt.Errorf("convert prevResult to version %s: %w", c.CNIVersion, err)
	}
	return json.Marshal(r)
}

// ips are the addresses the plugins before this one gave to the pod. Those of interfaces outside the pod's namespace
// are left out.
func (c *Conf) ips() ([]IP, error) {
	r, err := types100.NewResultFromResult(c.PrevResult)
	if err != nil {
		return nil, fmt.Errorf("read prevResult: %w", err)
	}
	var out []IP
	for _, ip := range r.IPs {
		var name string
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) {
			if r.Interfaces[*i].Sandbox == "" {
				continue
			}
			name = r.Interfaces[*i].Name
		}
		address, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, fmt.Errorf("read prevResult: %v is not an address", ip.Address)
		}
		ones, _ := ip.Address.Mask.Size()
		out = append(out, IP{Interface: name, Address: netip.PrefixFrom(address.Unmap(), ones), Gateway: addr(ip.Gateway)})
	}
	return out, nil
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

type podArgs struct{ namespace, name, uid string }

// parseArgs reads what a Kubernetes runtime says about the pod: CNI_ARGS, "K8S_POD_NAME=web;K8S_POD_NAMESPACE=…".
// Neither name nor namespace means that the container is no pod. Only one of the two is an error.
func parseArgs(args string) (podArgs, error) {
	var p podArgs
	for pair := range strings.SplitSeq(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.namespace = value
		case "K8S_POD_NAME":
			p.name = value
		case "K8S_POD_UID":
			p.uid = value
		}
	}
	if (p.name == "") != (p.namespace == "") {
		return p, types.NewError(types.ErrInvalidEnvironmentVariables,
			"CNI_ARGS must have both K8S_POD_NAME and K8S_POD_NAMESPACE, or neither", args)
	}
	return p, nil
}
