package meshtest

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// World is a mesh written down in a script, by these directives:
//
//	workload <namespace>/<name> addr=10.0.0.1,fd00::1 sa=default node=n1 hbone services=ns/host[80:8080;90:91],ns/host2 …
//	service <namespace>/<hostname> vip=10.96.0.1,10.97.0.0/16 ports=80:8080 lb=failover:network,region sans=td/ns/a/sa/b …
//	remove workload|service <name>
//
// The other keys are those of Workload and Service below. A waypoint or gateway is <namespace>/<hostname>:<port> or
// [<network>/]<address>:<port>, an IPv6 address in brackets.
type World struct{ Snapshot *mesh.Snapshot }

// NewWorld returns an empty mesh.
func NewWorld() *World { return &World{Snapshot: new(mesh.Snapshot)} }

// Run executes a directive that describes the mesh. ok is false when it is another one.
func (w *World) Run(d *Directive) (ok bool) {
	var delta mesh.Delta
	switch d.Command {
	case "workload":
		delta.Workloads = append(delta.Workloads, d.Workload())
	case "service":
		delta.Services = append(delta.Services, d.Service())
	case "remove":
		switch d.Word(0) {
		case "workload":
			delta.RemoveWorkloads = append(delta.RemoveWorkloads, w.Pod(d, d.Word(1)).UID)
		case "service":
			delta.RemoveServices = append(delta.RemoveServices, d.Word(1))
		default:
			d.Fatalf("remove workload or service, not %s", d.Word(0))
		}
	default:
		return false
	}
	w.Snapshot = w.Snapshot.Apply(delta)
	return true
}

// Pod returns the workload of a name (namespace/name).
func (w *World) Pod(d *Directive, name string) *mesh.Workload {
	ns, n, _ := strings.Cut(name, "/")
	p := w.Snapshot.Pod(ns, n)
	if p == nil {
		d.Fatalf("no workload %s", name)
	}
	return p
}

// Workload reads the noun a workload directive describes.
func (d *Directive) Workload() *mesh.Workload {
	ns, name, ok := strings.Cut(d.Word(0), "/")
	if !ok {
		d.Fatalf("want <namespace>/<name>, not %s", d.Word(0))
	}
	w := &mesh.Workload{
		UID: "Kubernetes//Pod/" + ns + "/" + name, Namespace: ns, Name: name,
		Network: d.Get("network"), Hostname: d.Get("hostname"),
		TrustDomain:    d.or("td", mesh.DefaultTrustDomain),
		ServiceAccount: d.or("sa", mesh.DefaultServiceAccount),
		NativeTunnel:   d.Has("native-tunnel"),
		Waypoint:       d.Gateway("waypoint"), NetworkGateway: d.Gateway("gateway"),
		Node: d.Get("node"), ClusterID: d.or("cluster", mesh.DefaultClusterID),
		HostNetwork: d.Has("host-network"), Healthy: !d.Has("unhealthy"),
		Capacity: uint32(d.number("capacity", 1)),
		AppTunnel: mesh.AppTunnel{
			Proxy: d.Has("proxy-protocol"), Port: uint16(d.number("tunnel-port", 0)),
		},
		Policies: d.List("policies"),
	}
	if d.Has("uid") {
		w.UID = d.Get("uid")
	}
	if d.Has("hbone") {
		w.Protocol = mesh.ProtocolHBONE
	}
	for _, a := range d.List("addr") {
		w.Addrs = append(w.Addrs, d.addr(a))
	}
	for i, part := range strings.Split(d.Get("locality"), "/") {
		switch i {
		case 0:
			w.Locality.Region = part
		case 1:
			w.Locality.Zone = part
		case 2:
			w.Locality.Subzone = part
		}
	}
	for _, s := range d.List("services") {
		key, ports, _ := strings.Cut(strings.TrimSuffix(s, "]"), "[")
		w.Services = append(w.Services, mesh.ServicePorts{Service: key, Ports: d.ports(ports, ";")})
	}
	return w
}

// Service reads the noun a service directive describes.
func (d *Directive) Service() *mesh.Service {
	ns, host, ok := strings.Cut(d.Word(0), "/")
	if !ok {
		d.Fatalf("want <namespace>/<hostname>, not %s", d.Word(0))
	}
	name, _, _ := strings.Cut(host, ".")
	s := &mesh.Service{
		Name: name, Namespace: ns, Hostname: host,
		Ports:    d.ports(d.Get("ports"), ","),
		Waypoint: d.Gateway("waypoint"), Canonical: d.Has("canonical"), NamespaceOnly: d.Has("namespace-only"),
	}
	for _, v := range d.List("vip") {
		network, a, ok := strings.Cut(v, "@")
		if !ok {
			network, a = "", v
		}
		if !strings.Contains(a, "/") {
			p := d.addr(a)
			a = a + "/" + strconv.Itoa(p.BitLen())
		}
		p, err := netip.ParsePrefix(a)
		if err != nil {
			d.Fatalf("%v", err)
		}
		s.VIPs = append(s.VIPs, mesh.VIP{Network: network, Prefix: p})
	}
	for _, san := range d.List("sans") {
		s.SANs = append(s.SANs, d.Identity(san))
	}
	for _, w := range d.List("weighted") {
		gw, weight, _ := strings.Cut(w, "*")
		n, err := strconv.ParseUint(weight, 10, 32)
		if err != nil {
			d.Fatalf("weight of %s: %v", w, err)
		}
		s.WeightedWaypoints = append(s.WeightedWaypoints, mesh.WeightedGateway{Gateway: d.gateway(gw), Weight: uint32(n)})
	}
	s.LB = d.LoadBalancing()
	s.Families = map[string]mesh.IPFamilies{
		"": mesh.FamiliesAny, "v4": mesh.FamiliesIPv4, "v6": mesh.FamiliesIPv6, "dual": mesh.FamiliesDual,
	}[d.Get("families")]
	return s
}

// LoadBalancing reads lb=<mode>[:<scope>,…] and the word allow-unready.
func (d *Directive) LoadBalancing() mesh.LoadBalancing {
	mode, scopes, _ := strings.Cut(d.Get("lb"), ":")
	l := mesh.LoadBalancing{AllowUnready: d.Has("allow-unready")}
	switch mode {
	case "", "any":
	case "strict":
		l.Mode = mesh.LBStrict
	case "failover":
		l.Mode = mesh.LBFailover
	case "passthrough":
		l.Mode = mesh.LBPassthrough
	default:
		d.Fatalf("no load-balancing mode %s", mode)
	}
	names := []string{"unknown", "region", "zone", "subzone", "node", "cluster", "network"}
	for _, s := range strings.FieldsFunc(scopes, func(r rune) bool { return r == ',' }) {
		i := slices.Index(names, s)
		if i < 0 {
			d.Fatalf("no scope %s", s)
		}
		l.Preference = append(l.Preference, mesh.LBScope(i))
	}
	return l
}

// Gateway reads key=, a gateway's address.
func (d *Directive) Gateway(key string) mesh.GatewayAddress {
	if !d.Has(key) {
		return mesh.GatewayAddress{}
	}
	return d.gateway(d.Get(key))
}

func (d *Directive) gateway(v string) mesh.GatewayAddress {
	i := strings.LastIndexByte(v, ':')
	if i < 0 {
		d.Fatalf("gateway %s has no port", v)
	}
	port, err := strconv.ParseUint(v[i+1:], 10, 16)
	if err != nil {
		d.Fatalf("gateway %s: %v", v, err)
	}
	gw := mesh.GatewayAddress{Port: uint16(port)}
	before, after, ok := strings.Cut(v[:i], "/")
	if !ok {
		before, after = "", before
	}
	if a, err := netip.ParseAddr(strings.Trim(after, "[]")); err == nil {
		gw.Addr = mesh.NetworkAddr{Network: before, Addr: a}
		return gw
	}
	gw.Namespace, gw.Hostname = before, after
	return gw
}

// Identity reads a principal, <trust domain>/ns/<namespace>/sa/<account>; "" is nobody.
func (d *Directive) Identity(principal string) mesh.Identity {
	if principal == "" {
		return mesh.Identity{}
	}
	id, err := mesh.ParseIdentity("spiffe://" + principal)
	if err != nil {
		d.Fatalf("%v", err)
	}
	return id
}

// AddrPort reads key=, an address and port.
func (d *Directive) AddrPort(key string) netip.AddrPort {
	a, err := netip.ParseAddrPort(d.Get(key))
	if err != nil {
		d.Fatalf("%s: %v", key, err)
	}
	return a
}

func (d *Directive) ports(list, sep string) []mesh.Port {
	var ports []mesh.Port
	for _, p := range strings.FieldsFunc(list, func(r rune) bool { return string(r) == sep }) {
		from, to, _ := strings.Cut(p, ":")
		service, err := strconv.ParseUint(from, 10, 16)
		target, err2 := strconv.ParseUint(to, 10, 16)
		if err != nil || err2 != nil {
			d.Fatalf("port %s is not <service port>:<target port>", p)
		}
		ports = append(ports, mesh.Port{ServicePort: uint16(service), TargetPort: uint16(target)})
	}
	return ports
}

func (d *Directive) addr(s string) netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil {
		d.Fatalf("%v", err)
	}
	return a
}

func (d *Directive) or(key, otherwise string) string {
	if d.Has(key) {
		return d.Get(key)
	}
	return otherwise
}

func (d *Directive) number(key string, otherwise uint64) uint64 {
	if !d.Has(key) {
		return otherwise
	}
	n, err := strconv.ParseUint(d.Get(key), 10, 32)
	if err != nil {
		d.Fatalf("%s: %v", key, err)
	}
	return n
}
