package netlab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	cniv1 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// PodSpec names a pod as Kubernetes does. UID "" is made up from the other two.
type PodSpec struct{ Namespace, Name, UID string }

// Pod is an attached pod.
type Pod struct {
	*Namespace
	Spec        PodSpec
	Node        *Node
	ContainerID string       // of its sandbox
	IPs         []netip.Addr // as the CNI plugins reported them: IPv4, then IPv6
}

// IP returns the pod's IPv4 address.
func (p *Pod) IP() netip.Addr { return p.IPs[0] }

// newCNI is a node's container runtime, as far as networks go. What plugins say besides their result is dropped: their
// errors are in the result.
func newCNI(pluginDirs []string, cacheDir string) *libcni.CNIConfig {
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{}, PluginDecoder: version.PluginDecoder{}}
	return libcni.NewCNIConfigWithCacheDir(pluginDirs, cacheDir, exec)
}

// conflist is what a cluster's installer puts in net.d: Debian's bridge and host-local, then chained, if any.
func conflist(cniVersion, ipamDir string, cidrs []netip.Prefix, chained []byte) ([]byte, error) {
	type subnet struct {
		Subnet string `json:"subnet"`
	}
	var ranges [][]subnet
	for _, c := range cidrs {
		ranges = append(ranges, []subnet{{c.String()}})
	}
	plugins := []any{map[string]any{
		"type": "bridge", "bridge": podBridgeName, "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
		"ipam": map[string]any{"type": "host-local", "dataDir": ipamDir, "ranges": ranges},
	}}
	if chained != nil {
		if !json.Valid(chained) {
			return nil, fmt.Errorf("chained plugin's configuration is no JSON: %q", chained)
		}
		plugins = append(plugins, json.RawMessage(chained))
	}
	b, err := json.MarshalIndent(map[string]any{"cniVersion": cniVersion, "name": "netlab", "plugins": plugins}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode conflist: %w", err)
	}
	if _, err := libcni.NetworkConfFromBytes(b); err != nil {
		return nil, fmt.Errorf("check conflist: %w", err)
	}
	return b, nil
}

// networks reads the node's conflist as it is now, and the one for the loopback that runtimes bring themselves.
func (n *Node) networks(cniVersion string) (lo, main *libcni.NetworkConfigList, err error) {
	files, err := libcni.ConfFiles(n.ConfDir, []string{".conflist"})
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", n.ConfDir, err)
	}
	if len(files) == 0 {
		return nil, nil, fmt.Errorf("no conflist in %s", n.ConfDir)
	}
	slices.Sort(files)
	main, err = libcni.NetworkConfFromFile(files[0])
	if err != nil {
		return nil, nil, fmt.Errorf("read conflist %s: %w", files[0], err)
	}
	lo, err = libcni.NetworkConfFromBytes(fmt.Appendf(nil,
		`{"cniVersion":%q,"name":"netlab-loopback","plugins":[{"type":"loopback"}]}`, cniVersion))
	return lo, main, err
}

// runtimeConf is what a container runtime passes for a pod.
func (p *Pod) runtimeConf(ifName string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: p.ContainerID, NetNS: p.Path, IfName: ifName,
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Spec.Namespace},
			{"K8S_POD_NAME", p.Spec.Name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.ContainerID},
			{"K8S_POD_UID", p.Spec.UID},
		},
	}
}

// AddPod makes a pod's namespace and has the node's CNI plugins attach it. When a plugin refuses, the pod is detached
// again as a runtime does, its namespace is removed, and the plugin's error is returned.
func (l *Lab) AddPod(ctx context.Context, n *Node, spec PodSpec) (*Pod, error) {
	key := spec.Namespace + "/" + spec.Name
	if spec.Namespace == "" || spec.Name == "" {
		return nil, errors.New("add pod: namespace and name are required")
	}
	l.mu.Lock()
	_, taken := l.pods[key]
	l.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("add pod %s: it is there already", key)
	}
	sum := sha256.Sum256([]byte(l.ID + "/" + n.Name + "/" + key + "/" + spec.UID))
	if spec.UID == "" {
		h := hex.EncodeToString(sum[16:])
		spec.UID = h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:32]
	}
	space, err := l.newNamespace(n.Name + "-" + spec.Namespace + "-" + spec.Name)
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", key, err)
	}
	p := &Pod{Namespace: space, Spec: spec, Node: n, ContainerID: hex.EncodeToString(sum[:])}
	if err := l.attach(ctx, p); err != nil {
		derr := l.detach(context.WithoutCancel(ctx), p)
		return nil, errors.Join(fmt.Errorf("add pod %s: %w", key, err), derr, l.drop(p.Namespace))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pods[key] = p
	return p, nil
}

// attach runs ADD.
func (l *Lab) attach(ctx context.Context, p *Pod) error {
	if err := p.Sysctl(l.baseSysctls()...); err != nil {
		return err
	}
	lo, main, err := p.Node.networks(l.cfg.CNIVersion)
	if err != nil {
		return err
	}
	var result cnitypes.Result
	err = p.Node.Do(func() error {
		if _, err := p.Node.cni.AddNetworkList(ctx, lo, p.runtimeConf("lo")); err != nil {
			return err
		}
		result, err = p.Node.cni.AddNetworkList(ctx, main, p.runtimeConf("eth0"))
		return err
	})
	if err != nil {
		return fmt.Errorf("CNI ADD: %w", err)
	}
	r, err := cniv1.NewResultFromResult(result)
	if err != nil {
		return fmt.Errorf("CNI result: %w", err)
	}
	for _, ip := range r.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			p.IPs = append(p.IPs, a.Unmap())
		}
	}
	if len(p.IPs) == 0 {
		return fmt.Errorf("CNI result holds no address: %v", r)
	}
	slices.SortStableFunc(p.IPs, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return nil
}

// detach runs DEL.
func (l *Lab) detach(ctx context.Context, p *Pod) error {
	lo, main, err := p.Node.networks(l.cfg.CNIVersion)
	if err != nil {
		return err
	}
	err = p.Node.Do(func() error {
		return errors.Join(
			p.Node.cni.DelNetworkList(ctx, main, p.runtimeConf("eth0")),
			p.Node.cni.DelNetworkList(ctx, lo, p.runtimeConf("lo")))
	})
	if err != nil {
		return fmt.Errorf("CNI DEL: %w", err)
	}
	return nil
}

// DelPod ends what runs in the pod, has the CNI plugins detach it, and removes its namespace, which goes also when a
// plugin fails.
func (l *Lab) DelPod(ctx context.Context, p *Pod) error {
	key := p.Spec.Namespace + "/" + p.Spec.Name
	l.mu.Lock()
	known := l.pods[key] == p
	if known {
		delete(l.pods, key)
	}
	l.mu.Unlock()
	if !known {
		return fmt.Errorf("delete pod %s: not there", key)
	}
	if err := errors.Join(killInside(map[uint64]bool{p.id: true}), l.detach(ctx, p), l.drop(p.Namespace)); err != nil {
		return fmt.Errorf("delete pod %s: %w", key, err)
	}
	return nil
}

// drop removes one namespace of a running lab.
func (l *Lab) drop(n *Namespace) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spaces = slices.DeleteFunc(l.spaces, func(o *Namespace) bool { return o == n })
	return errors.Join(n.Close(), deleteNamespace(n.Path))
}

// CheckPod runs CHECK: whether the pod still is as the plugins left it.
func (l *Lab) CheckPod(ctx context.Context, p *Pod) error {
	_, main, err := p.Node.networks(l.cfg.CNIVersion)
	if err != nil {
		return err
	}
	err = p.Node.Do(func() error { return p.Node.cni.CheckNetworkList(ctx, main, p.runtimeConf("eth0")) })
	if err != nil {
		return fmt.Errorf("CNI CHECK of %s/%s: %w", p.Spec.Namespace, p.Spec.Name, err)
	}
	return nil
}

// GC has the node's plugins forget every attachment that is not of a pod there is.
func (l *Lab) GC(ctx context.Context, n *Node) error {
	_, main, err := n.networks(l.cfg.CNIVersion)
	if err != nil {
		return err
	}
	args := &libcni.GCArgs{}
	for _, p := range l.Pods() {
		if p.Node == n {
			args.ValidAttachments = append(args.ValidAttachments, cnitypes.GCAttachment{ContainerID: p.ContainerID, IfName: "eth0"})
		}
	}
	if err := n.Do(func() error { return n.cni.GCNetworkList(ctx, main, args) }); err != nil {
		return fmt.Errorf("CNI GC on %s: %w", n.Name, err)
	}
	return nil
}

// Status asks the node's plugins whether they could attach a pod now. Before CNI 1.1.0 nobody is asked.
func (l *Lab) Status(ctx context.Context, n *Node) error {
	_, main, err := n.networks(l.cfg.CNIVersion)
	if err != nil {
		return err
	}
	if err := n.Do(func() error { return n.cni.GetStatusNetworkList(ctx, main) }); err != nil {
		return fmt.Errorf("CNI STATUS on %s: %w", n.Name, err)
	}
	return nil
}
