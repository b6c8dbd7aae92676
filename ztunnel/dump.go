package ztunnel

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/identity"
	"github.com/mistnet/mistnet/internal/mesh"
)

// dump is /config_dump, in the form `istioctl ztunnel-config` reads.
type dump struct {
	Workloads     []dumpWorkload             `json:"workloads"`
	Services      []dumpService              `json:"services"`
	Policies      []dumpPolicy               `json:"policies"`
	Certificates  []identity.CertificateInfo `json:"certificates"`
	WorkloadState map[string]dumpPod         `json:"workloadState"`
	Config        *Config                    `json:"config"`
	Version       map[string]string          `json:"version"`
}

type dumpWorkload struct {
	UID                   string       `json:"uid"`
	Name                  string       `json:"name"`
	Namespace             string       `json:"namespace"`
	WorkloadIPs           []netip.Addr `json:"workloadIps"`
	Protocol              string       `json:"protocol"`
	TrustDomain           string       `json:"trustDomain"`
	ServiceAccount        string       `json:"serviceAccount"`
	WorkloadName          string       `json:"workloadName"`
	WorkloadType          string       `json:"workloadType"`
	CanonicalName         string       `json:"canonicalName"`
	CanonicalRevision     string       `json:"canonicalRevision"`
	Node                  string       `json:"node"`
	Network               string       `json:"network"`
	ClusterID             string       `json:"clusterId"`
	Status                string       `json:"status"`
	Locality              dumpLocality `json:"locality"`
	Waypoint              string       `json:"waypoint,omitempty"`
	AuthorizationPolicies []string     `json:"authorizationPolicies,omitempty"`
}

type dumpLocality struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Subzone string `json:"subzone,omitempty"`
}

type dumpService struct {
	Name      string                  `json:"name"`
	Namespace string                  `json:"namespace"`
	Hostname  string                  `json:"hostname"`
	VIPs      []string                `json:"vips"`
	Ports     map[string]uint16       `json:"ports"`
	Endpoints map[string]dumpEndpoint `json:"endpoints"`
	Waypoint  string                  `json:"waypoint,omitempty"`
	Mode      string                  `json:"loadBalancerMode"`
}

type dumpEndpoint struct {
	WorkloadUID string            `json:"workloadUid"`
	Port        map[string]uint16 `json:"port"`
	Status      string            `json:"status"`
}

type dumpPolicy struct {
	Name      string       `json:"name"`
	Namespace string       `json:"namespace"`
	Scope     string       `json:"scope"`
	Action    string       `json:"action"`
	DryRun    bool         `json:"dryRun,omitempty"`
	Invalid   string       `json:"invalid,omitempty"`
	Rules     []mesh.Group `json:"rules"`
}

type dumpPod struct {
	State       string          `json:"state"`
	Info        dumpPodInfo     `json:"info"`
	Connections dumpConnections `json:"connections"`
}

type dumpPodInfo struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type dumpConnections struct {
	Inbound  []dumpConn `json:"inbound"`
	Outbound []dumpConn `json:"outbound"`
}

type dumpConn struct {
	Src         string `json:"src"`
	OriginalDst string `json:"originalDst"`
	ActualDst   string `json:"actualDst"`
	Protocol    string `json:"protocol"`
	Age         string `json:"age"`
	Sent        int64  `json:"bytesRequest"`
	Received    int64  `json:"bytesResponse"`
}

func (z *Ztunnel) dump() dump {
	v := z.state.load()
	d := dump{
		Certificates: z.ids.Certificates(), Config: z.cfg, WorkloadState: z.dumpPods(),
		Version: map[string]string{"version": daemon.Version()},
	}
	for _, w := range v.Workloads() {
		d.Workloads = append(d.Workloads, dumpOfWorkload(w))
	}
	for key, svc := range v.Services() {
		d.Services = append(d.Services, dumpOfService(svc, v.Endpoints(key)))
	}
	for _, p := range v.Policies() {
		d.Policies = append(d.Policies, dumpPolicy{
			Name: p.Name, Namespace: p.Namespace, Scope: p.Scope.String(), Action: p.Action.String(), DryRun: p.DryRun,
			Invalid: p.Invalid, Rules: p.Groups,
		})
	}
	slices.SortFunc(d.Workloads, func(a, b dumpWorkload) int { return cmp.Compare(a.UID, b.UID) })
	slices.SortFunc(d.Services, func(a, b dumpService) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Hostname, b.Hostname))
	})
	slices.SortFunc(d.Policies, func(a, b dumpPolicy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return d
}

func dumpOfWorkload(w *mesh.Workload) dumpWorkload {
	return dumpWorkload{
		UID: w.UID, Name: w.Name, Namespace: w.Namespace, WorkloadIPs: w.Addrs, Protocol: w.Protocol.String(),
		TrustDomain: w.TrustDomain, ServiceAccount: w.ServiceAccount, WorkloadName: w.OwnerName,
		WorkloadType: w.Kind.String(), CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		Node: w.Node, Network: w.Network, ClusterID: w.ClusterID, Status: health(w), Locality: dumpLocality(w.Locality),
		Waypoint: gatewayName(w.Waypoint), AuthorizationPolicies: w.Policies,
	}
}

func dumpOfService(svc *mesh.Service, eps []mesh.Endpoint) dumpService {
	d := dumpService{
		Name: svc.Name, Namespace: svc.Namespace, Hostname: svc.Hostname, Ports: dumpPorts(svc.Ports),
		Endpoints: make(map[string]dumpEndpoint, len(eps)), Waypoint: gatewayName(svc.Waypoint), Mode: svc.LB.Mode.String(),
	}
	for _, vip := range svc.VIPs {
		d.VIPs = append(d.VIPs, vip.Network+"/"+vip.Prefix.Addr().String())
	}
	for _, ep := range eps {
		d.Endpoints[ep.Workload.UID] = dumpEndpoint{
			WorkloadUID: ep.Workload.UID, Port: dumpPorts(ep.Ports), Status: health(ep.Workload),
		}
	}
	return d
}

func dumpPorts(ports []mesh.Port) map[string]uint16 {
	m := make(map[string]uint16, len(ports))
	for _, p := range ports {
		m[strconv.Itoa(int(p.ServicePort))] = p.TargetPort
	}
	return m
}

func health(w *mesh.Workload) string {
	if w.Healthy {
		return "Healthy"
	}
	return "Unhealthy"
}

func gatewayName(g mesh.GatewayAddress) string {
	switch {
	case g.IsZero():
		return ""
	case g.Hostname != "":
		return mesh.ServiceKey(g.Namespace, g.Hostname)
	}
	return g.Addr.Network + "/" + g.Addr.Addr.String()
}

// addrText is "" while the address is not known.
func addrText(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func (z *Ztunnel) dumpPods() map[string]dumpPod {
	connections := make(map[podKey]*dumpConnections)
	now := time.Now()
	z.conns.each(func(c *conn) {
		name := c.pod
		if !c.inbound && c.srcWorkload != nil {
			name = podKey{c.srcWorkload.Namespace, c.srcWorkload.Name}
		}
		list := connections[name]
		if list == nil {
			list = new(dumpConnections)
			connections[name] = list
		}
		dc := dumpConn{
			Src: c.src.String(), OriginalDst: addrText(c.original), ActualDst: addrText(c.target), Protocol: "TCP",
			Age: now.Sub(c.start).Round(time.Millisecond).String(), Sent: c.bytes.AToB.Load(), Received: c.bytes.BToA.Load(),
		}
		if c.tunnel != "" {
			dc.Protocol = "HBONE"
		}
		if c.inbound {
			list.Inbound = append(list.Inbound, dc)
			return
		}
		list.Outbound = append(list.Outbound, dc)
	})
	out := make(map[string]dumpPod)
	for _, d := range z.pods.list() {
		p := dumpPod{State: "Up", Info: dumpPodInfo{d.info.Name, d.info.Namespace, d.info.ServiceAccount}}
		if list := connections[d.key()]; list != nil {
			p.Connections = *list
		}
		out[d.info.UID] = p
	}
	return out
}
