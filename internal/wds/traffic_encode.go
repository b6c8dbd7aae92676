package wds

import (
	"fmt"

	"google.golang.org/protobuf/types/known/wrapperspb"

	pb "github.com/mistnet/mistnet/api/route"
	"github.com/mistnet/mistnet/internal/mesh"
)

// EncodeTrafficPolicy returns p as the bytes of a mistnet.route.v1.TrafficPolicy. Equal policies give equal bytes. It
// fails on what DecodeTrafficPolicy would refuse, naming the field.
func EncodeTrafficPolicy(p *mesh.TrafficPolicy) ([]byte, error) {
	m := trafficToProto(p)
	if _, err := trafficFromProto(m); err != nil {
		return nil, fmt.Errorf("encode traffic policy %q: %w", p.Key(), err)
	}
	return deterministic.Marshal(m)
}

func trafficToProto(p *mesh.TrafficPolicy) *pb.TrafficPolicy {
	return &pb.TrafficPolicy{
		Namespace: p.Namespace, Hostname: p.Hostname, Clients: p.Clients, Sources: p.Sources, Invalid: p.Invalid,
		Settings: settingsToProto(p.Settings), Ports: list(p.Ports, portSettingsToProto),
		Subsets: list(p.Subsets, func(s mesh.Subset) *pb.Subset {
			return &pb.Subset{
				Name: s.Name, Labels: s.Labels, Settings: settingsToProto(s.Settings), Ports: list(s.Ports, portSettingsToProto),
			}
		}),
	}
}

func portSettingsToProto(p mesh.PortSettings) *pb.PortSettings {
	return &pb.PortSettings{Port: uint32(p.Port), Settings: settingsToProto(p.Settings)}
}

func settingsToProto(s mesh.TrafficSettings) *pb.Settings {
	if s == (mesh.TrafficSettings{}) {
		return nil
	}
	m := &pb.Settings{
		Balancer: balancerToProto(s.Balancer), Pool: poolToProto(s.Pool), ProxyProtocol: pb.Settings_ProxyProtocol(s.ProxyProtocol),
		Persistence: persistenceToProto(s.Persistence),
	}
	if h := s.Health; h != nil {
		m.Health = &pb.HealthCheck{
			Protocol: pb.HealthCheck_Protocol(h.Protocol), Path: h.Path, Host: h.Host, Service: h.Service, Port: uint32(h.Port),
			Interval: duration(h.Interval), Timeout: duration(h.Timeout), Unhealthy: h.Unhealthy, Healthy: h.Healthy,
		}
	}
	if o := s.Outliers; o != nil {
		m.Outliers = &pb.OutlierDetection{
			Consecutive_5Xx: optionalNumber(o.Consecutive5xx), ConsecutiveGateway: optionalNumber(o.ConsecutiveGateway),
			ConsecutiveLocal: optionalNumber(o.ConsecutiveLocal), SplitLocal: o.SplitLocal, Interval: duration(o.Interval),
			BaseEjection: duration(o.BaseEjection), MaxEjected: o.MaxEjected, MinHealthy: o.MinHealthy,
			ErrorCodes: numbers(o.ErrorCodes),
		}
	}
	if t := s.TLS; t != nil {
		m.Tls = &pb.UpstreamTLS{
			Mode: pb.UpstreamTLS_Mode(t.Mode), ServerName: t.ServerName, Sans: t.SANs, CaCertificates: t.CACertificates,
			CaPem: t.CAPEM, SystemRoots: t.SystemRoots, ClientCertificate: t.ClientCertificate, PrivateKey: t.PrivateKey,
			Crl: t.CRL, CrlPem: t.CRLPEM, Credential: t.Credential, InsecureSkipVerify: t.InsecureSkipVerify,
		}
	}
	if t := s.Tunnel; t != nil {
		m.Tunnel = &pb.ForwardTunnel{Post: t.Post, TargetHost: t.TargetHost, TargetPort: uint32(t.TargetPort)}
	}
	if b := s.RetryBudget; b != nil {
		m.RetryBudget = &pb.RetryBudget{
			Percent: fraction(b.Percent), MinConcurrency: b.MinConcurrency, MinRate: b.MinRate,
			MinRateInterval: duration(b.MinRateInterval), Interval: duration(b.Interval),
		}
	}
	return m
}

func balancerToProto(b *mesh.Balancer) *pb.Balancer {
	if b == nil {
		return nil
	}
	m := &pb.Balancer{Algorithm: pb.Balancer_Algorithm(b.Algorithm)}
	if h := b.Hash; h != nil {
		m.Hash = &pb.ConsistentHash{MinRingSize: h.MinRingSize, TableSize: h.TableSize}
		switch {
		case h.Header != "":
			m.Hash.Key = &pb.ConsistentHash_Header{Header: h.Header}
		case h.Cookie != nil:
			m.Hash.Key = &pb.ConsistentHash_Cookie{Cookie: &pb.HashCookie{
				Name: h.Cookie.Name, Path: h.Cookie.Path, Ttl: optionalDuration(h.Cookie.TTL),
				Attributes: list(h.Cookie.Attributes, func(a mesh.CookieAttribute) *pb.Header {
					return &pb.Header{Name: a.Name, Value: a.Value}
				}),
			}}
		case h.QueryParam != "":
			m.Hash.Key = &pb.ConsistentHash_QueryParam{QueryParam: h.QueryParam}
		case h.SourceIP:
			m.Hash.Key = &pb.ConsistentHash_SourceIp{SourceIp: true}
		}
	}
	if l := b.Locality; l != nil {
		m.Locality = &pb.LocalityBalance{
			Disabled: l.Disabled, FailoverPriority: l.FailoverPriority,
			Distribute: list(l.Distribute, func(d mesh.LocalityDistribute) *pb.LocalityBalance_Distribute {
				return &pb.LocalityBalance_Distribute{From: d.From, To: d.To}
			}),
			Failover: list(l.Failover, func(f mesh.LocalityFailover) *pb.LocalityBalance_Failover {
				return &pb.LocalityBalance_Failover{From: f.From, To: f.To}
			}),
		}
	}
	if w := b.Warmup; w != nil {
		m.Warmup = &pb.Warmup{Duration: duration(w.Duration), MinPercent: fraction(w.MinPercent), Aggression: w.Aggression}
	}
	return m
}

func poolToProto(p *mesh.ConnectionPool) *pb.ConnectionPool {
	if p == nil {
		return nil
	}
	m := &pb.ConnectionPool{
		MaxConnections: p.MaxConnections, ConnectTimeout: duration(p.ConnectTimeout),
		MaxConnectionDuration: duration(p.MaxConnectionDuration), TcpIdleTimeout: optionalDuration(p.TCPIdleTimeout),
		MaxPending: p.MaxPending, MaxRequests: p.MaxRequests, MaxPerConnection: p.MaxPerConnection, MaxRetries: p.MaxRetries,
		MaxStreams: p.MaxStreams, HttpIdleTimeout: optionalDuration(p.HTTPIdleTimeout), Upgrade: pb.ConnectionPool_H2Upgrade(p.Upgrade),
		UseClientProtocol: p.UseClientProtocol, Http2PingInterval: duration(p.HTTP2PingInterval),
		Http2PingTimeout: duration(p.HTTP2PingTimeout),
	}
	if k := p.Keepalive; k != nil {
		m.Keepalive = &pb.Keepalive{Probes: k.Probes, Time: duration(k.Time), Interval: duration(k.Interval)}
	}
	return m
}

func optionalNumber(n *uint32) *wrapperspb.UInt32Value {
	if n == nil {
		return nil
	}
	return wrapperspb.UInt32(*n)
}
