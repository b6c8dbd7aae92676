package mesh

import "time"

// TrafficPolicy is how one service is talked to: what DestinationRule, BackendTLSPolicy and XBackendTrafficPolicy say of
// it, already merged in their order of precedence.
type TrafficPolicy struct {
	Namespace string // of the service
	Hostname  string // of the service, fully qualified
	Clients   string // namespace of the waypoints it is for, whose DestinationRules come first; "": all the others

	Sources  []string // the objects that say it, kind/namespace/name, the strongest first; for logs and dumps
	Settings TrafficSettings
	Ports    []PortSettings // portLevelSettings, sorted by port
	Subsets  []Subset       // sorted by name

	// Invalid says why the policy could not be understood; "" when it could. Nothing is sent to such a service: a policy
	// that asks for TLS must not become plaintext.
	Invalid string
}

// Key names the policy in the mesh, and is its resource name: clients/namespace/hostname.
func (p *TrafficPolicy) Key() string { return p.Clients + "/" + p.Namespace + "/" + p.Hostname }

// For returns what holds for a port of a subset ("": the whole service). ok is false when there is no such subset.
// Settings of a subset replace those of the service field by field; those of a port replace balancer, pool, outlier
// detection and TLS altogether, so that what they leave out is the default again. The service's come first, then those of
// its port, the subset's, and those of the subset's port. p may be nil.
func (p *TrafficPolicy) For(subset string, port uint16) (s TrafficSettings, ok bool) {
	if p == nil {
		return s, subset == ""
	}
	s = p.Settings.at(p.Ports, port)
	if subset == "" {
		return s, true
	}
	sub := p.Subset(subset)
	if sub == nil {
		return TrafficSettings{}, false
	}
	return s.override(sub.Settings).at(sub.Ports, port), true
}

// Subset returns the subset of that name, or nil.
func (p *TrafficPolicy) Subset(name string) *Subset {
	for i := range p.Subsets {
		if p.Subsets[i].Name == name {
			return &p.Subsets[i]
		}
	}
	return nil
}

// TrafficSettings are the parts of a policy. What is nil is the default.
type TrafficSettings struct {
	Balancer      *Balancer           // loadBalancer
	Pool          *ConnectionPool     // connectionPool
	Outliers      *OutlierDetection   // outlierDetection
	TLS           *UpstreamTLS        // tls, BackendTLSPolicy
	Tunnel        *ForwardTunnel      // tunnel
	ProxyProtocol ProxyProtocol       // proxyProtocol
	RetryBudget   *RetryBudget        // retryBudget, retryConstraint
	Persistence   *SessionPersistence // XBackendTrafficPolicy sessionPersistence
	Health        *HealthCheck        // annotation mistnet.io/health-check of a DestinationRule; nil: endpoints are not asked
}

// at replaces what the settings of a port replace.
func (s TrafficSettings) at(ports []PortSettings, port uint16) TrafficSettings {
	for i := range ports {
		if p := &ports[i]; p.Port == port {
			s.Balancer, s.Pool, s.Outliers, s.TLS = p.Settings.Balancer, p.Settings.Pool, p.Settings.Outliers, p.Settings.TLS
		}
	}
	return s
}

// override replaces every field that by has.
func (s TrafficSettings) override(by TrafficSettings) TrafficSettings {
	if by.Balancer != nil {
		s.Balancer = by.Balancer
	}
	if by.Pool != nil {
		s.Pool = by.Pool
	}
	if by.Outliers != nil {
		s.Outliers = by.Outliers
	}
	if by.TLS != nil {
		s.TLS = by.TLS
	}
	if by.Tunnel != nil {
		s.Tunnel = by.Tunnel
	}
	if by.ProxyProtocol != ProxyProtocolNone {
		s.ProxyProtocol = by.ProxyProtocol
	}
	if by.RetryBudget != nil {
		s.RetryBudget = by.RetryBudget
	}
	if by.Persistence != nil {
		s.Persistence = by.Persistence
	}
	if by.Health != nil {
		s.Health = by.Health
	}
	return s
}

// PortSettings are those of one port of the service. Only Balancer, Pool, Outliers and TLS count.
type PortSettings struct {
	Port     uint16
	Settings TrafficSettings
}

// Subset is the part of a service's endpoints that carry Labels (DestinationRule subsets[]).
type Subset struct {
	Name     string
	Labels   map[string]string // none: every endpoint
	Settings TrafficSettings   // trafficPolicy
	Ports    []PortSettings    // trafficPolicy.portLevelSettings, sorted by port
}

// Balancer is how an endpoint is chosen.
type Balancer struct {
	Algorithm BalancerAlgorithm
	Hash      *ConsistentHash  // with BalancerRingHash and BalancerMaglev
	Locality  *LocalityBalance // localityLbSetting; nil: the mesh's default
	Warmup    *Warmup          // warmup, warmupDurationSecs; with BalancerLeastRequest and BalancerRoundRobin
}

// BalancerAlgorithm is how one of the eligible endpoints is chosen.
type BalancerAlgorithm uint8

// The algorithms.
const (
	BalancerLeastRequest BalancerAlgorithm = iota // UNSPECIFIED, LEAST_REQUEST, LEAST_CONN: the less busy of two random ones
	BalancerRoundRobin
	BalancerRandom
	BalancerPassthrough // the address the client dialled
	BalancerRingHash
	BalancerMaglev
)

func (a BalancerAlgorithm) String() string {
	switch a {
	case BalancerLeastRequest:
		return "LEAST_REQUEST"
	case BalancerRoundRobin:
		return "ROUND_ROBIN"
	case BalancerRandom:
		return "RANDOM"
	case BalancerPassthrough:
		return "PASSTHROUGH"
	case BalancerRingHash:
		return "RING_HASH"
	case BalancerMaglev:
		return "MAGLEV"
	}
	return "UNKNOWN"
}

// ConsistentHash is what requests are told apart by; exactly one of Header, Cookie, QueryParam and SourceIP is set.
type ConsistentHash struct {
	Header     string      // httpHeaderName, lower case
	Cookie     *HashCookie // httpCookie
	QueryParam string      // httpQueryParameterName
	SourceIP   bool        // useSourceIp: of the client itself, not of a proxy on the way

	MinRingSize uint64 // ringHash.minimumRingSize, at most MaxRingSize; 0: 1024
	TableSize   uint64 // maglev.tableSize, a prime; 0: 65537
}

// MaxRingSize bounds ConsistentHash.MinRingSize, so that no policy takes all memory.
const MaxRingSize = 1 << 20

// IsTableSize reports whether n may be a ConsistentHash.TableSize: a prime, and within Envoy's bound.
func IsTableSize(n uint64) bool {
	if n < 2 || n > 5000011 {
		return false
	}
	for d := uint64(2); d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return true
}

// HashCookie is a cookie to hash.
type HashCookie struct {
	Name       string
	Path       string
	TTL        *time.Duration    // nil: the cookie is never set by the proxy; 0: for the browser's session
	Attributes []CookieAttribute // further ones, as they are to be written
}

// CookieAttribute is one that stands behind a cookie's value: Name, or Name=Value (RFC 6265, 4.1.1).
type CookieAttribute struct{ Name, Value string }

// LocalityBalance prefers endpoints near the client. Distribute excludes the other two.
type LocalityBalance struct {
	Disabled         bool                 // enabled: false
	Distribute       []LocalityDistribute // distribute
	Failover         []LocalityFailover   // failover; acts only with outlier detection
	FailoverPriority []string             // failoverPriority: labels, key or key=value, the most important first
}

// LocalityDistribute says which parts of the traffic from a locality go where. A locality is region/zone/subzone, of
// which the last parts may be * or missing.
type LocalityDistribute struct {
	From string
	To   map[string]uint32 // per cent by locality; the sum is 100
}

// LocalityFailover names the region to turn to when that of the client fails.
type LocalityFailover struct{ From, To string }

// Warmup gives a new endpoint its share of the traffic little by little.
type Warmup struct {
	Duration   time.Duration
	MinPercent Fraction // minimumPercent of the share to start with; zero: 10 %
	Aggression float64  // 0: 1, which is linear
}

// defaultIdleTimeout is that of tcp.idleTimeout in Istio's API.
const defaultIdleTimeout = time.Hour

// IdleTimeout is how long a TCP connection may carry nothing before it is ended; 0: for ever, as one who writes 0 has it. p may be nil.
func (p *ConnectionPool) IdleTimeout() time.Duration {
	if p == nil || p.TCPIdleTimeout == nil {
		return defaultIdleTimeout
	}
	return *p.TCPIdleTimeout
}

// ConnectionPool bounds what is open to a service from one waypoint. What is beyond is refused with 503. Zero is no bound.
type ConnectionPool struct {
	MaxConnections        uint32         // tcp.maxConnections
	ConnectTimeout        time.Duration  // tcp.connectTimeout; 0: 10 s
	MaxConnectionDuration time.Duration  // tcp.maxConnectionDuration; 0: no end
	TCPIdleTimeout        *time.Duration // tcp.idleTimeout; see IdleTimeout
	Keepalive             *Keepalive     // tcp.tcpKeepalive

	MaxPending        uint32         // http.http1MaxPendingRequests: requests that wait for a connection
	MaxRequests       uint32         // http.http2MaxRequests: requests under way, whatever the version of HTTP
	MaxPerConnection  uint32         // http.maxRequestsPerConnection, over its life; 1: no keep-alive
	MaxRetries        uint32         // http.maxRetries: retries under way
	MaxStreams        uint32         // http.maxConcurrentStreams of one connection
	HTTPIdleTimeout   *time.Duration // http.idleTimeout; nil: the proxy's choice, 0: none
	Upgrade           H2Upgrade      // http.h2UpgradePolicy
	UseClientProtocol bool           // http.useClientProtocol: the HTTP version of the request
	HTTP2PingInterval time.Duration  // http.http2KeepAlive.interval; 0: none
	HTTP2PingTimeout  time.Duration  // http.http2KeepAlive.timeout
}

// Keepalive is TCP's. Zero is the kernel's choice.
type Keepalive struct {
	Probes   uint32
	Time     time.Duration
	Interval time.Duration
}

// H2Upgrade says whether HTTP/1.1 requests go out as HTTP/2.
type H2Upgrade uint8

// The policies, with Istio's numbers.
const (
	H2UpgradeDefault H2Upgrade = iota
	H2UpgradeNever
	H2UpgradeAlways
)

// OutlierDetection takes endpoints out that fail. A nil count is the default, 0 switches that kind off.
type OutlierDetection struct {
	Consecutive5xx     *uint32 // consecutive5xxErrors, consecutiveErrors; nil: 5
	ConsecutiveGateway *uint32 // consecutiveGatewayErrors: 502, 503, 504; nil: off
	ConsecutiveLocal   *uint32 // consecutiveLocalOriginFailures, with SplitLocal; nil: 5
	SplitLocal         bool    // splitExternalLocalOriginErrors: failures to connect are counted apart

	Interval     time.Duration // between two looks; 0: 10 s
	BaseEjection time.Duration // baseEjectionTime, times how often the endpoint was ejected; 0: 30 s
	MaxEjected   uint32        // maxEjectionPercent; 0: 10. One endpoint may always be ejected
	MinHealthy   uint32        // minHealthPercent: below it all endpoints are used
	ErrorCodes   []uint16      // outlierDetectionHttpErrorCodes: the statuses that count as failures; none: 5xx
}

// HealthCheck is how a waypoint asks endpoints whether they are well. An endpoint that it was not yet asked is.
type HealthCheck struct {
	Protocol HealthProtocol
	Path     string // of HealthHTTP: what is asked for, query included
	Host     string // of HealthHTTP and HealthGRPC: the authority; "": the service's hostname
	Service  string // of HealthGRPC: whose health; "": the whole server's
	Port     uint16 // of endpoints; 0: each that the service's ports lead to

	Interval, Timeout time.Duration // between the beginnings of two checks; of one
	// Unhealthy and Healthy are how many checks in a row must fail to take an endpoint out, and pass to take it back.
	Unhealthy, Healthy uint32
}

// Validate names what is wrong with h; "" when nothing is.
func (h *HealthCheck) Validate() string {
	const most = 24 * time.Hour
	switch {
	case h.Protocol > HealthGRPC:
		return "protocol: is none of HTTP, TCP and GRPC"
	case h.Protocol == HealthHTTP && !isRequestTarget(h.Path):
		return "path: want a path that begins with /"
	case h.Protocol != HealthHTTP && h.Path != "":
		return "path: only HTTP has one"
	case h.Protocol == HealthTCP && h.Host != "":
		return "host: TCP has none"
	case !isAuthority(h.Host):
		return "host: is no host's name"
	case h.Protocol != HealthGRPC && h.Service != "":
		return "service: only GRPC has one"
	case h.Interval < time.Second || h.Interval > most:
		return "interval: want a second at least, and a day at most"
	case h.Timeout <= 0 || h.Timeout > h.Interval:
		return "timeout: want more than nothing, and no more than the interval"
	case h.Unhealthy < 1 || h.Healthy < 1:
		return "unhealthyThreshold, healthyThreshold: want 1 at least"
	}
	return ""
}

// isRequestTarget reports whether a request may ask for s: RFC 9112, 3.2.1.
func isRequestTarget(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || s[i] == '#' {
			return false
		}
	}
	return s != "" && s[0] == '/'
}

// isAuthority reports whether a request may name s as its host, or need not.
func isAuthority(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_', c == ':', c == '[', c == ']':
		default:
			return false
		}
	}
	return true
}

// HealthProtocol is how an endpoint is asked.
type HealthProtocol uint8

// The protocols.
const (
	HealthHTTP HealthProtocol = iota // GET; 200 to 399 is well
	HealthTCP                        // a connection is well
	HealthGRPC                       // grpc.health.v1.Health/Check; SERVING is well
)

func (p HealthProtocol) String() string {
	switch p {
	case HealthHTTP:
		return "HTTP"
	case HealthTCP:
		return "TCP"
	case HealthGRPC:
		return "GRPC"
	}
	return "UNKNOWN"
}

// UpstreamTLS is TLS from the waypoint to the application itself, inside whatever carries the connection.
type UpstreamTLS struct {
	Mode TLSMode

	ServerName         string   // sni, validation.hostname; "": the service's hostname
	SANs               []string // subjectAltNames: one of them must be shown; none: ServerName must
	CACertificates     string   // caCertificates: a file of the waypoint
	CAPEM              []byte   // the certificates themselves, of BackendTLSPolicy caCertificateRefs
	SystemRoots        bool     // wellKnownCACertificates: System
	ClientCertificate  string   // clientCertificate: a file of the waypoint
	PrivateKey         string   // privateKey: a file of the waypoint
	CRL                string   // caCrl: a file of the waypoint
	CRLPEM             []byte   // revocation lists themselves, of a ConfigMap
	Credential         string   // credentialName: the Key of a Credential, which is there instead of files
	InsecureSkipVerify bool
}

// TLSMode is how a connection is secured.
type TLSMode uint8

// The modes, with Istio's numbers.
const (
	TLSDisable TLSMode = iota // nothing of its own: HBONE or plain
	TLSSimple
	TLSMutual
	TLSIstioMutual // the mesh's: HBONE
)

func (m TLSMode) String() string {
	switch m {
	case TLSDisable:
		return "DISABLE"
	case TLSSimple:
		return "SIMPLE"
	case TLSMutual:
		return "MUTUAL"
	case TLSIstioMutual:
		return "ISTIO_MUTUAL"
	}
	return "UNKNOWN"
}

// ForwardTunnel goes through a forward proxy.
type ForwardTunnel struct {
	Post       bool   // protocol: POST instead of CONNECT
	TargetHost string // name or address
	TargetPort uint16
}

// ProxyProtocol is the header in front of a connection that tells the client's address.
type ProxyProtocol uint8

// The versions.
const (
	ProxyProtocolNone ProxyProtocol = iota
	ProxyProtocolV1
	ProxyProtocolV2
)

// RetryBudget bounds retries under way to a part of the requests under way.
type RetryBudget struct {
	Percent         Fraction      // percent, budget.percent; zero: 20 %
	MinConcurrency  uint32        // minRetryConcurrency: always allowed; 0: 3
	MinRate         uint32        // minRetryRate.count: retries always allowed within MinRateInterval; 0: none
	MinRateInterval time.Duration // minRetryRate.interval; 0: 1 s
	Interval        time.Duration // budgetInterval, budget.interval: requests within it count; 0: those under way
}
