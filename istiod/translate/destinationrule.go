package translate

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	networkingapi "istio.io/api/networking/v1alpha3"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// ruleFault is one thing in a DestinationRule that is not honoured.
type ruleFault struct {
	reason StatusReason
	text   string
	closes bool // nothing may be sent to the service, as it might go where or how it must not
}

type ruleFaults []ruleFault

// closing is why nothing may be sent; "" when it may.
func (fs ruleFaults) closing() string {
	var why []string
	for _, f := range fs {
		if f.closes {
			why = append(why, f.text)
		}
	}
	return strings.Join(why, "; ")
}

// ruleReader reads what one DestinationRule says. What is wrong is left out, and noted with its path.
type ruleReader struct {
	dr     *DestinationRule
	sans   []string
	faults *ruleFaults

	secrets    map[Name]*corev1.Secret
	noSecrets  bool // as in Config
	configMaps map[Name]*corev1.ConfigMap
}

func (r *ruleReader) fault(reason StatusReason, at, format string, args ...any) {
	*r.faults = append(*r.faults, ruleFault{reason: reason, text: at + ": " + fmt.Sprintf(format, args...)})
}

// closed notes a fault that must not be passed over by going without.
func (r *ruleReader) closed(reason StatusReason, at, format string, args ...any) {
	*r.faults = append(*r.faults, ruleFault{reason: reason, closes: true,
		text: at + ": " + fmt.Sprintf(format, args...) + "; nothing is sent to the service"})
}

func (r *ruleReader) subset(i int, s *networkingapi.Subset) mesh.Subset {
	at := fmt.Sprintf("subsets[%d]", i)
	if s.GetName() == "" {
		r.fault(Invalid, at+".name", "is empty, the subset is left out")
	}
	out := mesh.Subset{Name: s.GetName(), Labels: filled(s.GetLabels())}
	out.Settings, out.Ports = r.settings(at+".trafficPolicy", s.GetTrafficPolicy())
	return out
}

func (r *ruleReader) settings(at string, p *networkingapi.TrafficPolicy) (mesh.TrafficSettings, []mesh.PortSettings) {
	if p == nil {
		return mesh.TrafficSettings{}, nil
	}
	s := mesh.TrafficSettings{
		Balancer: r.balancer(at+".loadBalancer", p.GetLoadBalancer(), p.GetOutlierDetection() != nil || r.checked()),
		Pool:     r.pool(at+".connectionPool", p.GetConnectionPool()),
		Outliers: r.outliers(at+".outlierDetection", p.GetOutlierDetection()),
		TLS:      r.tls(at+".tls", p.GetTls()),
	}
	if t := p.GetTunnel(); t != nil {
		s.Tunnel = r.tunnel(at+".tunnel", t)
	}
	if pp := p.GetProxyProtocol(); pp != nil {
		s.ProxyProtocol = mesh.ProxyProtocolV1
		if pp.GetVersion() == networkingapi.TrafficPolicy_ProxyProtocol_V2 {
			s.ProxyProtocol = mesh.ProxyProtocolV2
		}
	}
	if b := p.GetRetryBudget(); b != nil {
		s.RetryBudget = &mesh.RetryBudget{
			Percent: r.percent(at+".retryBudget.percent", b.GetPercent()), MinConcurrency: b.GetMinRetryConcurrency(),
			Interval: r.duration(at+".retryBudget.budgetInterval", b.GetBudgetInterval()),
		}
	}
	var ports []mesh.PortSettings
	for i, l := range p.GetPortLevelSettings() {
		at := fmt.Sprintf("%s.portLevelSettings[%d]", at, i)
		n := l.GetPort().GetNumber()
		if n < 1 || n > math.MaxUint16 {
			r.fault(Invalid, at+".port.number", "%d is not a port, its settings are left out", n)
			continue
		}
		if slices.ContainsFunc(ports, func(o mesh.PortSettings) bool { return uint32(o.Port) == n }) {
			r.fault(Conflicted, at, "left out, port %d has settings above", n)
			continue
		}
		ports = append(ports, mesh.PortSettings{Port: uint16(n), Settings: mesh.TrafficSettings{
			Balancer: r.balancer(at+".loadBalancer", l.GetLoadBalancer(), l.GetOutlierDetection() != nil || r.checked()),
			Pool:     r.pool(at+".connectionPool", l.GetConnectionPool()),
			Outliers: r.outliers(at+".outlierDetection", l.GetOutlierDetection()),
			TLS:      r.tls(at+".tls", l.GetTls()),
		}})
	}
	slices.SortFunc(ports, func(a, b mesh.PortSettings) int { return int(a.Port) - int(b.Port) })
	return s, ports
}

var simpleBalancers = map[networkingapi.LoadBalancerSettings_SimpleLB]mesh.BalancerAlgorithm{
	networkingapi.LoadBalancerSettings_UNSPECIFIED: mesh.BalancerLeastRequest,
	//lint:ignore SA1019 still written by users
	networkingapi.LoadBalancerSettings_LEAST_CONN:    mesh.BalancerLeastRequest,
	networkingapi.LoadBalancerSettings_LEAST_REQUEST: mesh.BalancerLeastRequest,
	networkingapi.LoadBalancerSettings_RANDOM:        mesh.BalancerRandom,
	networkingapi.LoadBalancerSettings_ROUND_ROBIN:   mesh.BalancerRoundRobin,
	networkingapi.LoadBalancerSettings_PASSTHROUGH:   mesh.BalancerPassthrough,
}

// checked reports whether the rule has endpoints asked whether they are well.
func (r *ruleReader) checked() bool {
	h, _ := healthCheck(r.dr)
	return h != nil
}

// balancer reads loadBalancer. ejects: there is outlier detection beside it, or a health check.
func (r *ruleReader) balancer(at string, lb *networkingapi.LoadBalancerSettings, ejects bool) *mesh.Balancer {
	if lb == nil {
		return nil
	}
	b := &mesh.Balancer{}
	switch policy := lb.GetLbPolicy().(type) {
	case *networkingapi.LoadBalancerSettings_Simple:
		algorithm, ok := simpleBalancers[policy.Simple]
		if !ok {
			r.fault(Invalid, at+".simple", "%d is no algorithm, LEAST_REQUEST is used", policy.Simple)
		}
		if b.Algorithm = algorithm; algorithm == mesh.BalancerPassthrough {
			r.fault(Unsupported, at+".simple", "PASSTHROUGH is what hosts of resolution NONE have in any case; LEAST_REQUEST is used for others")
		}
	case *networkingapi.LoadBalancerSettings_ConsistentHash:
		r.hash(at+".consistentHash", policy.ConsistentHash, b)
	}
	b.Locality = r.locality(at+".localityLbSetting", lb.GetLocalityLbSetting(), ejects)
	if lb.GetZoneAwareLbSetting() != nil {
		r.fault(Unsupported, at+".zoneAwareLbSetting", "has no effect, use localityLbSetting")
	}
	b.Warmup = r.warmup(at, lb)
	if b.Warmup != nil && b.Algorithm != mesh.BalancerLeastRequest && b.Algorithm != mesh.BalancerRoundRobin {
		r.fault(Ignored, at+".warmup", "has no effect with %v", b.Algorithm)
		b.Warmup = nil
	}
	return b
}

func (r *ruleReader) hash(at string, h *networkingapi.LoadBalancerSettings_ConsistentHashLB, b *mesh.Balancer) {
	out := &mesh.ConsistentHash{}
	switch key := h.GetHashKey().(type) {
	case *networkingapi.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		out.Header = strings.ToLower(key.HttpHeaderName)
		if !mesh.IsHeaderName(out.Header) {
			r.fault(Invalid, at+".httpHeaderName", "%q is no header's name, LEAST_REQUEST is used", key.HttpHeaderName)
			return
		}
	case *networkingapi.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		c := key.HttpCookie
		if c.GetName() == "" {
			r.fault(Invalid, at+".httpCookie.name", "is empty, LEAST_REQUEST is used")
			return
		}
		out.Cookie = &mesh.HashCookie{Name: c.GetName(), Path: c.GetPath(), TTL: r.optionalDuration(at+".httpCookie.ttl", c.GetTtl())}
		for i, a := range c.GetAttributes() {
			if a.GetName() == "" {
				r.fault(Invalid, fmt.Sprintf("%s.httpCookie.attributes[%d].name", at, i), "is empty, the attribute is left out")
				continue
			}
			out.Cookie.Attributes = append(out.Cookie.Attributes, mesh.CookieAttribute{Name: a.GetName(), Value: a.GetValue()})
		}
	case *networkingapi.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		out.SourceIP = key.UseSourceIp
	case *networkingapi.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		out.QueryParam = key.HttpQueryParameterName
	}
	if out.Header == "" && out.Cookie == nil && !out.SourceIP && out.QueryParam == "" {
		r.fault(Invalid, at, "says nothing to hash, LEAST_REQUEST is used")
		return
	}
	b.Algorithm, b.Hash = mesh.BalancerRingHash, out
	//lint:ignore SA1019 still written by users
	out.MinRingSize = max(h.GetMinimumRingSize(), h.GetRingHash().GetMinimumRingSize())
	if out.MinRingSize > mesh.MaxRingSize {
		r.fault(Invalid, at+".ringHash.minimumRingSize", "%d is more than %d, which is used", out.MinRingSize, mesh.MaxRingSize)
		out.MinRingSize = mesh.MaxRingSize
	}
	if m, ok := h.GetHashAlgorithm().(*networkingapi.LoadBalancerSettings_ConsistentHashLB_Maglev); ok {
		b.Algorithm, out.MinRingSize = mesh.BalancerMaglev, 0
		if out.TableSize = m.Maglev.GetTableSize(); out.TableSize != 0 && !mesh.IsTableSize(out.TableSize) {
			r.fault(Invalid, at+".maglev.tableSize", "%d is no prime of at most 5000011, 65537 is used", out.TableSize)
			out.TableSize = 0
		}
	}
}

func (r *ruleReader) locality(at string, l *networkingapi.LocalityLoadBalancerSetting, ejects bool) *mesh.LocalityBalance {
	if l == nil {
		return nil
	}
	out := &mesh.LocalityBalance{Disabled: l.GetEnabled() != nil && !l.GetEnabled().GetValue()}
	if out.Disabled {
		return out
	}
	for i, d := range l.GetDistribute() {
		sum := uint64(0)
		for _, percent := range d.GetTo() {
			sum += uint64(percent)
		}
		if d.GetFrom() == "" || sum != 100 {
			r.fault(Invalid, fmt.Sprintf("%s.distribute[%d]", at, i), "left out: from must be a locality, and the parts add up to 100, not %d", sum)
			continue
		}
		out.Distribute = append(out.Distribute, mesh.LocalityDistribute{From: d.GetFrom(), To: maps.Clone(d.GetTo())})
	}
	for i, f := range l.GetFailover() {
		if f.GetFrom() == "" || f.GetTo() == "" || f.GetFrom() == f.GetTo() || strings.ContainsAny(f.GetFrom()+f.GetTo(), "/*") {
			r.fault(Invalid, fmt.Sprintf("%s.failover[%d]", at, i), "left out: from and to must be two regions")
			continue
		}
		out.Failover = append(out.Failover, mesh.LocalityFailover{From: f.GetFrom(), To: f.GetTo()})
	}
	out.FailoverPriority = slices.DeleteFunc(slices.Clone(l.GetFailoverPriority()), func(s string) bool { return s == "" })
	if len(out.FailoverPriority) == 0 {
		out.FailoverPriority = nil
	}
	if len(out.Distribute) > 0 && len(out.Failover)+len(out.FailoverPriority) > 0 {
		r.fault(Conflicted, at, "distribute excludes failover and failoverPriority, which are left out")
		out.Failover, out.FailoverPriority = nil, nil
	}
	if len(out.Failover)+len(out.FailoverPriority) > 0 && !ejects {
		r.fault(Ignored, at, "failover and failoverPriority have no effect without outlierDetection beside loadBalancer, or annotation %s", AnnotationHealthCheck)
	}
	return out
}

func (r *ruleReader) warmup(at string, lb *networkingapi.LoadBalancerSettings) *mesh.Warmup {
	if w := lb.GetWarmup(); w != nil {
		out := &mesh.Warmup{
			Duration:   r.duration(at+".warmup.duration", w.GetDuration()),
			MinPercent: r.percent(at+".warmup.minimumPercent", w.GetMinimumPercent()),
		}
		if a := w.GetAggression(); a != nil {
			if out.Aggression = a.GetValue(); !(out.Aggression >= 1 && out.Aggression < 1e6) {
				r.fault(Invalid, at+".warmup.aggression", "%v is less than 1, which is used", out.Aggression)
				out.Aggression = 0
			}
		}
		if out.Duration == 0 {
			r.fault(Invalid, at+".warmup.duration", "is not positive, there is no warm-up")
			return nil
		}
		return out
	}
	if d := r.duration(at+".warmupDurationSecs", lb.GetWarmupDurationSecs()); d > 0 {
		return &mesh.Warmup{Duration: d}
	}
	return nil
}

func (r *ruleReader) pool(at string, p *networkingapi.ConnectionPoolSettings) *mesh.ConnectionPool {
	if p == nil {
		return nil
	}
	out := &mesh.ConnectionPool{}
	if t := p.GetTcp(); t != nil {
		at := at + ".tcp"
		out.MaxConnections = r.count(at+".maxConnections", t.GetMaxConnections())
		out.ConnectTimeout = r.duration(at+".connectTimeout", t.GetConnectTimeout())
		out.MaxConnectionDuration = r.duration(at+".maxConnectionDuration", t.GetMaxConnectionDuration())
		out.TCPIdleTimeout = r.optionalDuration(at+".idleTimeout", t.GetIdleTimeout())
		if k := t.GetTcpKeepalive(); k != nil {
			out.Keepalive = &mesh.Keepalive{
				Probes: k.GetProbes(), Time: r.duration(at+".tcpKeepalive.time", k.GetTime()),
				Interval: r.duration(at+".tcpKeepalive.interval", k.GetInterval()),
			}
		}
	}
	if h := p.GetHttp(); h != nil {
		at := at + ".http"
		out.MaxPending = r.count(at+".http1MaxPendingRequests", h.GetHttp1MaxPendingRequests())
		out.MaxRequests = r.count(at+".http2MaxRequests", h.GetHttp2MaxRequests())
		out.MaxPerConnection = r.count(at+".maxRequestsPerConnection", h.GetMaxRequestsPerConnection())
		out.MaxRetries = r.count(at+".maxRetries", h.GetMaxRetries())
		out.MaxStreams = r.count(at+".maxConcurrentStreams", h.GetMaxConcurrentStreams())
		out.HTTPIdleTimeout = r.optionalDuration(at+".idleTimeout", h.GetIdleTimeout())
		out.UseClientProtocol = h.GetUseClientProtocol()
		switch h.GetH2UpgradePolicy() {
		case networkingapi.ConnectionPoolSettings_HTTPSettings_DEFAULT:
		case networkingapi.ConnectionPoolSettings_HTTPSettings_DO_NOT_UPGRADE:
			out.Upgrade = mesh.H2UpgradeNever
		case networkingapi.ConnectionPoolSettings_HTTPSettings_UPGRADE:
			out.Upgrade = mesh.H2UpgradeAlways
		default:
			r.fault(Invalid, at+".h2UpgradePolicy", "%d is no policy, DEFAULT is used", h.GetH2UpgradePolicy())
		}
		if k := h.GetHttp2KeepAlive(); k != nil {
			out.HTTP2PingInterval = r.duration(at+".http2KeepAlive.interval", k.GetInterval())
			out.HTTP2PingTimeout = r.duration(at+".http2KeepAlive.timeout", k.GetTimeout())
		}
	}
	return out
}

func (r *ruleReader) outliers(at string, o *networkingapi.OutlierDetection) *mesh.OutlierDetection {
	if o == nil {
		return nil
	}
	out := &mesh.OutlierDetection{
		Consecutive5xx: number(o.GetConsecutive_5XxErrors()), ConsecutiveGateway: number(o.GetConsecutiveGatewayErrors()),
		ConsecutiveLocal: number(o.GetConsecutiveLocalOriginFailures()), SplitLocal: o.GetSplitExternalLocalOriginErrors(),
		Interval: r.duration(at+".interval", o.GetInterval()), BaseEjection: r.duration(at+".baseEjectionTime", o.GetBaseEjectionTime()),
		MaxEjected: min(r.count(at+".maxEjectionPercent", o.GetMaxEjectionPercent()), 100),
		MinHealthy: min(r.count(at+".minHealthPercent", o.GetMinHealthPercent()), 100),
	}
	//lint:ignore SA1019 still written by users
	if n := r.count(at+".consecutiveErrors", o.GetConsecutiveErrors()); n > 0 && out.Consecutive5xx == nil {
		out.Consecutive5xx = &n
	}
	for i, code := range o.GetOutlierDetectionHttpErrorCodes() {
		if code < 100 || code > 599 {
			r.fault(Invalid, fmt.Sprintf("%s.outlierDetectionHttpErrorCodes[%d]", at, i), "left out: %d is no status", code)
			continue
		}
		out.ErrorCodes = append(out.ErrorCodes, uint16(code))
	}
	if out.ConsecutiveLocal != nil && !out.SplitLocal {
		r.fault(Ignored, at+".consecutiveLocalOriginFailures", "has no effect without splitExternalLocalOriginErrors")
	}
	return out
}

// tls reads how to begin TLS with the application. What is wrong with it closes the service.
func (r *ruleReader) tls(at string, t *networkingapi.ClientTLSSettings) *mesh.UpstreamTLS {
	if t == nil {
		return nil
	}
	out := &mesh.UpstreamTLS{}
	switch t.GetMode() {
	case networkingapi.ClientTLSSettings_DISABLE:
		return out
	case networkingapi.ClientTLSSettings_ISTIO_MUTUAL:
		out.Mode = mesh.TLSIstioMutual
		return out
	case networkingapi.ClientTLSSettings_SIMPLE:
		out.Mode = mesh.TLSSimple
	case networkingapi.ClientTLSSettings_MUTUAL:
		out.Mode = mesh.TLSMutual
	default:
		r.closed(Invalid, at+".mode", "%d is no mode", t.GetMode())
		return nil
	}
	out.ServerName, out.CACertificates = t.GetSni(), t.GetCaCertificates()
	out.SANs = slices.Clone(t.GetSubjectAltNames())
	if len(out.SANs) == 0 {
		out.SANs = slices.Clone(r.sans)
	}
	if len(out.SANs) == 0 {
		out.SANs = nil
	}
	out.InsecureSkipVerify = t.GetInsecureSkipVerify().GetValue()
	if t.GetCredentialName() != "" {
		if !r.credential(at, t, out) {
			return nil
		}
		return out
	}
	out.CRL = t.GetCaCrl()
	if out.Mode == mesh.TLSSimple {
		return out
	}
	if out.ClientCertificate, out.PrivateKey = t.GetClientCertificate(), t.GetPrivateKey(); out.ClientCertificate == "" || out.PrivateKey == "" {
		r.closed(Invalid, at, "mode MUTUAL needs clientCertificate and privateKey")
		return nil
	}
	return out
}

func (r *ruleReader) tunnel(at string, t *networkingapi.TrafficPolicy_TunnelSettings) *mesh.ForwardTunnel {
	out := &mesh.ForwardTunnel{Post: strings.EqualFold(t.GetProtocol(), "POST"), TargetHost: t.GetTargetHost()}
	if t.GetTargetHost() == "" || t.GetTargetPort() < 1 || t.GetTargetPort() > math.MaxUint16 ||
		t.GetProtocol() != "" && !out.Post && !strings.EqualFold(t.GetProtocol(), "CONNECT") {
		r.closed(Invalid, at, "needs targetHost, a targetPort, and CONNECT or POST for protocol")
		return nil
	}
	if out.TargetPort = uint16(t.GetTargetPort()); out.Post {
		r.closed(Unsupported, at+".protocol", "POST is not spoken")
	}
	return out
}

// count is n, which must not be negative.
func (r *ruleReader) count(at string, n int32) uint32 {
	if n < 0 {
		r.fault(Invalid, at, "%d is negative, the default is used", n)
		return 0
	}
	return uint32(n)
}

func number(n *wrapperspb.UInt32Value) *uint32 {
	if n == nil {
		return nil
	}
	v := n.GetValue()
	return &v
}

// percent is a part of the whole; zero when nothing is said.
func (r *ruleReader) percent(at string, p *wrapperspb.DoubleValue) mesh.Fraction {
	if p == nil {
		return mesh.Fraction{}
	}
	v := p.GetValue()
	if !(v >= 0 && v <= 100) {
		r.fault(Invalid, at, "%v is not 0 to 100, the default is used", v)
		return mesh.Fraction{}
	}
	if v == math.Trunc(v) {
		return mesh.Fraction{Numerator: uint32(v), Denominator: 100}
	}
	return mesh.Fraction{Numerator: uint32(math.Round(v * 10_000)), Denominator: 1_000_000}
}

func (r *ruleReader) duration(at string, d *durationpb.Duration) time.Duration {
	if d == nil {
		return 0
	}
	v := d.AsDuration()
	if d.CheckValid() != nil || v < 0 || v == math.MaxInt64 {
		r.fault(Invalid, at, "is negative or too long, the default is used")
		return 0
	}
	return v
}

func (r *ruleReader) optionalDuration(at string, d *durationpb.Duration) *time.Duration {
	before := len(*r.faults)
	v := r.duration(at, d)
	if d == nil || len(*r.faults) > before {
		return nil
	}
	return &v
}
