package wds

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	pb "github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
)

// DecodeTrafficPolicy reads the bytes of a mistnet.route.v1.TrafficPolicy. An error names each field at fault, fields
// this version does not know among them, and then the policy is nil.
func DecodeTrafficPolicy(body []byte) (*mesh.TrafficPolicy, error) {
	var m pb.TrafficPolicy
	if err := proto.Unmarshal(body, &m); err != nil {
		return nil, fmt.Errorf("decode traffic policy: %w", err)
	}
	p, err := trafficFromProto(&m)
	if err != nil {
		return nil, fmt.Errorf("decode traffic policy %q: %w", mesh.ServiceKey(m.GetNamespace(), m.GetHostname()), err)
	}
	return p, nil
}

func trafficFromProto(m *pb.TrafficPolicy) (*mesh.TrafficPolicy, error) {
	r := routeReader{}
	r.unknownFields("", m.ProtoReflect())
	out := &mesh.TrafficPolicy{
		Namespace: r.filled("namespace", m.GetNamespace()), Hostname: r.filled("hostname", m.GetHostname()),
		Clients: m.GetClients(), Sources: filledList(m.GetSources()), Invalid: m.GetInvalid(),
		Settings: r.settings("settings", m.GetSettings()), Ports: r.ports("ports", m.GetPorts()),
	}
	last := ""
	out.Subsets = each(m.GetSubsets(), "subsets", func(at string, s *pb.Subset) mesh.Subset {
		if s.GetName() <= last {
			r.fail(at+".name", fmt.Errorf("%q is empty, twice, or out of order", s.GetName()))
		}
		last = s.GetName()
		return mesh.Subset{
			Name: s.GetName(), Labels: filledMap(s.GetLabels()), Settings: r.settings(at+".settings", s.GetSettings()),
			Ports: r.ports(at+".ports", s.GetPorts()),
		}
	})
	if err := errors.Join(r.errs...); err != nil {
		return nil, err
	}
	return out, nil
}

func (r *routeReader) ports(at string, ms []*pb.PortSettings) []mesh.PortSettings {
	last := uint32(0)
	return each(ms, at, func(at string, m *pb.PortSettings) mesh.PortSettings {
		if m.GetPort() <= last {
			r.fail(at+".port", fmt.Errorf("%d is zero, twice, or out of order", m.GetPort()))
		}
		last = m.GetPort()
		return mesh.PortSettings{Port: r.port(at+".port", m.GetPort()), Settings: r.settings(at+".settings", m.GetSettings())}
	})
}

func (r *routeReader) settings(at string, m *pb.Settings) mesh.TrafficSettings {
	s := mesh.TrafficSettings{
		Balancer: r.balancer(at+".balancer", m.GetBalancer()), Pool: r.pool(at+".pool", m.GetPool()),
		Outliers: r.outliers(at+".outliers", m.GetOutliers()), TLS: r.tls(at+".tls", m.GetTls()),
		ProxyProtocol: mesh.ProxyProtocol(r.enum(at+".proxy_protocol", m.GetProxyProtocol(), true)),
		Persistence:   r.persistence(at+".persistence", m.GetPersistence()),
		Health:        r.health(at+".health", m.GetHealth()),
	}
	if t := m.GetTunnel(); t != nil {
		s.Tunnel = &mesh.ForwardTunnel{
			Post: t.GetPost(), TargetHost: r.filled(at+".tunnel.target_host", t.GetTargetHost()),
			TargetPort: r.port(at+".tunnel.target_port", t.GetTargetPort()),
		}
		if t.GetTargetPort() == 0 {
			r.fail(at+".tunnel.target_port", errors.New("is empty"))
		}
	}
	if b := m.GetRetryBudget(); b != nil {
		s.RetryBudget = &mesh.RetryBudget{
			Percent: r.fraction(at+".retry_budget.percent", b.GetPercent()), MinConcurrency: b.GetMinConcurrency(),
			MinRate: b.GetMinRate(), MinRateInterval: r.duration(at+".retry_budget.min_rate_interval", b.GetMinRateInterval()),
			Interval: r.duration(at+".retry_budget.interval", b.GetInterval()),
		}
	}
	return s
}

func (r *routeReader) balancer(at string, m *pb.Balancer) *mesh.Balancer {
	if m == nil {
		return nil
	}
	b := &mesh.Balancer{
		Algorithm: mesh.BalancerAlgorithm(r.enum(at+".algorithm", m.GetAlgorithm(), true)),
		Hash:      r.hash(at+".hash", m.GetHash()),
		Locality:  r.locality(at+".locality", m.GetLocality()),
	}
	hashes := b.Algorithm == mesh.BalancerRingHash || b.Algorithm == mesh.BalancerMaglev
	if hashes != (b.Hash != nil) {
		r.fail(at+".hash", fmt.Errorf("does not go with %v", b.Algorithm))
	}
	if w := m.GetWarmup(); w != nil {
		b.Warmup = &mesh.Warmup{
			Duration: r.duration(at+".warmup.duration", w.GetDuration()), MinPercent: r.fraction(at+".warmup.min_percent", w.GetMinPercent()),
			Aggression: w.GetAggression(),
		}
		if !(w.GetAggression() >= 0 && w.GetAggression() < 1e6) { // NaN neither
			r.fail(at+".warmup.aggression", fmt.Errorf("%v is out of range", w.GetAggression()))
		}
	}
	return b
}

func (r *routeReader) hash(at string, m *pb.ConsistentHash) *mesh.ConsistentHash {
	if m == nil {
		return nil
	}
	h := &mesh.ConsistentHash{MinRingSize: m.GetMinRingSize(), TableSize: m.GetTableSize()}
	if h.MinRingSize > mesh.MaxRingSize {
		r.fail(at+".min_ring_size", fmt.Errorf("%d is more than %d", h.MinRingSize, mesh.MaxRingSize))
	}
	if h.TableSize != 0 && !mesh.IsTableSize(h.TableSize) {
		r.fail(at+".table_size", fmt.Errorf("%d is not a prime of at most 5000011", h.TableSize))
	}
	switch k := m.GetKey().(type) {
	case *pb.ConsistentHash_Header:
		if h.Header = k.Header; !mesh.IsHeaderName(k.Header) {
			r.fail(at+".header", fmt.Errorf("%q is not the name of a header in lower case", k.Header))
		}
	case *pb.ConsistentHash_Cookie:
		h.Cookie = &mesh.HashCookie{
			Name: r.filled(at+".cookie.name", k.Cookie.GetName()), Path: k.Cookie.GetPath(),
			TTL: r.optionalDuration(at+".cookie.ttl", k.Cookie.GetTtl()),
			Attributes: each(k.Cookie.GetAttributes(), at+".cookie.attributes", func(at string, a *pb.Header) mesh.CookieAttribute {
				return mesh.CookieAttribute{Name: r.filled(at+".name", a.GetName()), Value: a.GetValue()}
			}),
		}
	case *pb.ConsistentHash_QueryParam:
		h.QueryParam = r.filled(at+".query_param", k.QueryParam)
	case *pb.ConsistentHash_SourceIp:
		if h.SourceIP = k.SourceIp; !k.SourceIp {
			r.fail(at+".source_ip", errors.New("is false"))
		}
	default:
		r.fail(at+".key", errors.New("is empty"))
	}
	return h
}

func (r *routeReader) locality(at string, m *pb.LocalityBalance) *mesh.LocalityBalance {
	if m == nil {
		return nil
	}
	l := &mesh.LocalityBalance{Disabled: m.GetDisabled(), FailoverPriority: filledList(m.GetFailoverPriority())}
	l.Distribute = each(m.GetDistribute(), at+".distribute", func(at string, d *pb.LocalityBalance_Distribute) mesh.LocalityDistribute {
		sum := uint64(0)
		for _, percent := range d.GetTo() {
			sum += uint64(percent)
		}
		if sum != 100 {
			r.fail(at+".to", fmt.Errorf("the parts add up to %d, not 100", sum))
		}
		return mesh.LocalityDistribute{From: r.filled(at+".from", d.GetFrom()), To: filledMap(d.GetTo())}
	})
	l.Failover = each(m.GetFailover(), at+".failover", func(at string, f *pb.LocalityBalance_Failover) mesh.LocalityFailover {
		return mesh.LocalityFailover{From: r.filled(at+".from", f.GetFrom()), To: r.filled(at+".to", f.GetTo())}
	})
	if len(l.Distribute) > 0 && len(l.Failover)+len(l.FailoverPriority) > 0 {
		r.fail(at+".distribute", errors.New("excludes failover and failover_priority"))
	}
	return l
}

func (r *routeReader) pool(at string, m *pb.ConnectionPool) *mesh.ConnectionPool {
	if m == nil {
		return nil
	}
	p := &mesh.ConnectionPool{
		MaxConnections: m.GetMaxConnections(), ConnectTimeout: r.duration(at+".connect_timeout", m.GetConnectTimeout()),
		MaxConnectionDuration: r.duration(at+".max_connection_duration", m.GetMaxConnectionDuration()),
		TCPIdleTimeout:        r.optionalDuration(at+".tcp_idle_timeout", m.GetTcpIdleTimeout()),
		MaxPending:            m.GetMaxPending(), MaxRequests: m.GetMaxRequests(), MaxPerConnection: m.GetMaxPerConnection(),
		MaxRetries: m.GetMaxRetries(), MaxStreams: m.GetMaxStreams(),
		HTTPIdleTimeout: r.optionalDuration(at+".http_idle_timeout", m.GetHttpIdleTimeout()),
		Upgrade:         mesh.H2Upgrade(r.enum(at+".upgrade", m.GetUpgrade(), true)), UseClientProtocol: m.GetUseClientProtocol(),
		HTTP2PingInterval: r.duration(at+".http2_ping_interval", m.GetHttp2PingInterval()),
		HTTP2PingTimeout:  r.duration(at+".http2_ping_timeout", m.GetHttp2PingTimeout()),
	}
	if k := m.GetKeepalive(); k != nil {
		p.Keepalive = &mesh.Keepalive{
			Probes: k.GetProbes(), Time: r.duration(at+".keepalive.time", k.GetTime()),
			Interval: r.duration(at+".keepalive.interval", k.GetInterval()),
		}
	}
	return p
}

func (r *routeReader) outliers(at string, m *pb.OutlierDetection) *mesh.OutlierDetection {
	if m == nil {
		return nil
	}
	o := &mesh.OutlierDetection{
		Consecutive5xx: number(m.GetConsecutive_5Xx()), ConsecutiveGateway: number(m.GetConsecutiveGateway()),
		ConsecutiveLocal: number(m.GetConsecutiveLocal()), SplitLocal: m.GetSplitLocal(),
		Interval: r.duration(at+".interval", m.GetInterval()), BaseEjection: r.duration(at+".base_ejection", m.GetBaseEjection()),
		MaxEjected: m.GetMaxEjected(), MinHealthy: m.GetMinHealthy(), ErrorCodes: r.statuses(at+".error_codes", m.GetErrorCodes()),
	}
	if o.MaxEjected > 100 {
		r.fail(at+".max_ejected", fmt.Errorf("%d is more than 100", o.MaxEjected))
	}
	if o.MinHealthy > 100 {
		r.fail(at+".min_healthy", fmt.Errorf("%d is more than 100", o.MinHealthy))
	}
	return o
}

func (r *routeReader) health(at string, m *pb.HealthCheck) *mesh.HealthCheck {
	if m == nil {
		return nil
	}
	h := &mesh.HealthCheck{
		Protocol: mesh.HealthProtocol(r.enum(at+".protocol", m.GetProtocol(), true)), Path: m.GetPath(), Host: m.GetHost(),
		Service: m.GetService(), Port: r.port(at+".port", m.GetPort()), Interval: r.duration(at+".interval", m.GetInterval()),
		Timeout: r.duration(at+".timeout", m.GetTimeout()), Unhealthy: m.GetUnhealthy(), Healthy: m.GetHealthy(),
	}
	if why := h.Validate(); why != "" {
		r.fail(at, errors.New(why))
	}
	return h
}

func (r *routeReader) tls(at string, m *pb.UpstreamTLS) *mesh.UpstreamTLS {
	if m == nil {
		return nil
	}
	t := &mesh.UpstreamTLS{
		Mode: mesh.TLSMode(r.enum(at+".mode", m.GetMode(), true)), ServerName: m.GetServerName(), SANs: filledList(m.GetSans()),
		CACertificates: m.GetCaCertificates(), CAPEM: filledBytes(m.GetCaPem()), SystemRoots: m.GetSystemRoots(),
		ClientCertificate: m.GetClientCertificate(), PrivateKey: m.GetPrivateKey(), CRL: m.GetCrl(), CRLPEM: filledBytes(m.GetCrlPem()),
		Credential: m.GetCredential(), InsecureSkipVerify: m.GetInsecureSkipVerify(),
	}
	if t.Mode == mesh.TLSMutual && t.Credential == "" && (t.ClientCertificate == "" || t.PrivateKey == "") {
		r.fail(at+".client_certificate", errors.New("MUTUAL has neither a credential nor a certificate and key"))
	}
	return t
}

func number(n *wrapperspb.UInt32Value) *uint32 {
	if n == nil {
		return nil
	}
	v := n.GetValue()
	return &v
}
