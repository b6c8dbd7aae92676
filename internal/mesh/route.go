package mesh

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Resource types of L7 configuration over delta xDS.
const (
	TypeRoute         = "type.googleapis.com/mistnet.route.v1.Route"
	TypeTrafficPolicy = "type.googleapis.com/mistnet.route.v1.TrafficPolicy"
	TypeCredential    = "type.googleapis.com/mistnet.route.v1.Credential"
)

// Route is one rule of a user's route as data: an entry of VirtualService http, tls or tcp, or a rule of an HTTPRoute,
// GRPCRoute, TLSRoute or TCPRoute. It points up to the services it is for. Package waypoint/route compiles it.
type Route struct {
	Kind      RouteKind
	Namespace string // of the object
	Name      string // of the object
	Protocol  RouteProtocol
	Rule      uint32    // the index in its list: rules, or http, tls and tcp of a VirtualService
	RuleName  string    // VirtualService http[].name, HTTPRoute rules[].name; for logs
	Created   time.Time // metadata.creationTimestamp, UTC, whole seconds; older routes come first

	Parents []RouteParent

	HTTP   *HTTPRule   // set when Protocol is RouteHTTP
	Stream *StreamRule // set when Protocol is RouteTLS or RouteTCP

	// Invalid says why the rule could not be understood; "" when it could. Requests that match such a rule are refused
	// with 500 rather than handed to the next one: what the rule would have kept from them is not known. A condition
	// that could not be understood is left out of the matches, which makes them wider.
	Invalid string
}

// Key names the rule in the mesh, and is its resource name: kind/namespace/name/protocol/rule.
func (r *Route) Key() string {
	return r.Object() + "/" + r.Protocol.String() + "/" + strconv.FormatUint(uint64(r.Rule), 10)
}

// Object names the user's object that the rule belongs to: kind/namespace/name.
func (r *Route) Object() string { return r.Kind.String() + "/" + r.Namespace + "/" + r.Name }

// RouteKind is the kind of object a Route was written in.
type RouteKind uint8

// The kinds of route.
const (
	KindRouteUnknown RouteKind = iota
	KindVirtualService
	KindHTTPRoute
	KindGRPCRoute
	KindTLSRoute
	KindTCPRoute
)

func (k RouteKind) String() string {
	switch k {
	case KindVirtualService:
		return "VirtualService"
	case KindHTTPRoute:
		return "HTTPRoute"
	case KindGRPCRoute:
		return "GRPCRoute"
	case KindTLSRoute:
		return "TLSRoute"
	case KindTCPRoute:
		return "TCPRoute"
	case KindRouteUnknown:
	}
	return "UnknownRoute"
}

// RouteProtocol is what a rule looks at: a request, the SNI of a TLS handshake, or a connection.
type RouteProtocol uint8

// The protocols of routes.
const (
	RouteProtocolUnknown RouteProtocol = iota
	RouteHTTP
	RouteTLS
	RouteTCP
)

func (p RouteProtocol) String() string {
	switch p {
	case RouteHTTP:
		return "http"
	case RouteTLS:
		return "tls"
	case RouteTCP:
		return "tcp"
	case RouteProtocolUnknown:
	}
	return "unknown"
}

// RouteParent is a service whose traffic a rule is for.
type RouteParent struct {
	Namespace string // of the service
	Hostname  string // of the service, fully qualified
	Port      uint16 // parentRefs[].port; 0: every port

	// Clients narrows the rule to clients of that namespace; "": everybody. It is how a consumer route (a Gateway API
	// route outside its service's namespace, GEP-1426) is said; such routes come before all others.
	Clients string
}

// MatchRegex is a RE2 expression that must match the whole string. Only routes know it: policies refuse it.
const MatchRegex MatchKind = MatchPresence + 1

// NamedMatch is a test on the value of a header or query parameter, which must be there. Of MatchPresence that is all,
// and the value may be empty.
type NamedMatch struct {
	Name  string // of a header: lower case
	Match StringMatch
}

// HTTPRule says what happens to the requests that it matches: Redirect, Direct, or else they go to Backends.
type HTTPRule struct {
	Matches []HTTPMatch // any of them; none: every request

	Redirect *Redirect       // VirtualService redirect, RequestRedirect; before Direct and Backends
	Direct   *DirectResponse // VirtualService directResponse
	Backends []Backend       // VirtualService route, backendRefs; none, or no weight at all: 500

	Rewrite *Rewrite    // VirtualService rewrite, URLRewrite
	Headers HeaderEdits // VirtualService headers, RequestHeaderModifier, ResponseHeaderModifier; after those of the backend
	Fault   *Fault      // VirtualService fault
	CORS    *CORS       // VirtualService corsPolicy, CORS
	Mirrors []Mirror    // VirtualService mirror and mirrors, RequestMirror

	Timeout    time.Duration // VirtualService timeout, timeouts.request: from request to end of response, retries included; 0: none
	TryTimeout time.Duration // VirtualService retries.perTryTimeout, timeouts.backendRequest: of each try; 0: none
	Retry      *Retry        // VirtualService retries, rules[].retry; nil: the mesh's default

	Persistence *SessionPersistence // rules[].sessionPersistence
}

// HTTPMatch holds when every condition that is set does.
type HTTPMatch struct {
	Name      string       // VirtualService match.name; for logs
	Path      PathMatch    // uri and ignoreUriCase; path; a GRPCRoute's method as /service/method
	Scheme    *StringMatch // scheme
	Method    *StringMatch // method; case-sensitive
	Authority *StringMatch // authority, as the client wrote it, port included; letters' case does not count

	Headers        []NamedMatch // headers; several values of one name are joined with ","
	WithoutHeaders []NamedMatch // withoutHeaders: none of these holds. MatchRegex reads a missing header as ""
	QueryParams    []NamedMatch // queryParams; of a name given twice the first value counts

	Port            uint16            // port of the service; 0: any
	SourceLabels    map[string]string // sourceLabels: labels the client's workload carries
	SourceNamespace string            // sourceNamespace; "": any
	GRPC            bool              // only gRPC requests
}

// PathMatch is a test on the path of a request, without its query.
type PathMatch struct {
	Kind       PathKind
	Value      string
	IgnoreCase bool // ignoreUriCase; not for PathRegex
}

// PathKind is how a PathMatch reads its value.
type PathKind uint8

// The kinds of path match.
const (
	PathAny     PathKind = iota // every path
	PathExact                   // the whole path
	PathPrefix                  // how it begins: /foo matches /foobar (VirtualService)
	PathSegment                 // how it begins, whole segments: /foo matches /foo and /foo/bar (Gateway API)
	PathRegex                   // RE2, the whole path
)

func (k PathKind) String() string {
	switch k {
	case PathAny:
		return "any"
	case PathExact:
		return "exact"
	case PathPrefix:
		return "prefix"
	case PathSegment:
		return "segment"
	case PathRegex:
		return "regex"
	}
	return "unknown"
}

// BackendRef is where traffic is to go.
type BackendRef struct {
	Namespace string // of the service
	Hostname  string // of the service, fully qualified
	Port      uint16 // of the service; 0: the port the client asked for
	Subset    string // of the service's TrafficPolicy; "": all endpoints

	// Invalid says why there is no such backend (unknown service, no ReferenceGrant, wrong kind); "" when there is. Its
	// share of the requests is refused: 500 by a Gateway API route, 503 by a VirtualService.
	Invalid string
}

// Service is the key of the service referred to: namespace/hostname.
func (b *BackendRef) Service() string { return ServiceKey(b.Namespace, b.Hostname) }

// Backend is one of several destinations that share a rule's traffic.
type Backend struct {
	Ref    BackendRef
	Weight uint32 // its part of the sum of all; 0: none. The single destination of a VirtualService has all

	Headers  HeaderEdits // headers of a destination, header filters of a backendRef; before those of the rule
	Redirect *Redirect   // RequestRedirect of a backendRef
	Rewrite  *Rewrite    // URLRewrite of a backendRef; instead of the rule's
	Mirrors  []Mirror    // RequestMirror of a backendRef
}

// Redirect answers with a Location.
type Redirect struct {
	Status    uint16 // redirectCode, statusCode: 301, 302, 303, 307 or 308
	Scheme    string // "": the request's
	Authority string // host, which may carry a port; "": the request's
	PortFrom  RedirectPort
	Port      uint16   // with RedirectPortFixed
	Path      PathEdit // the query is kept unless the new path carries one
}

// RedirectPort is where the port of a redirect comes from. It is not written when it is the default of the scheme.
type RedirectPort uint8

// The sources of a redirect's port.
const (
	// RedirectPortDefault is that of Scheme or Authority when one is set, else what the request's authority says
	// (FROM_PROTOCOL_DEFAULT, and VirtualService without any).
	RedirectPortDefault RedirectPort = iota
	RedirectPortRequest              // the port the request came to (FROM_REQUEST_PORT; Gateway API with neither port nor scheme)
	RedirectPortFixed                // Redirect.Port
)

// DirectResponse answers without a backend.
type DirectResponse struct {
	Status uint16
	Body   []byte
}

// Rewrite changes a request on its way to the backend.
type Rewrite struct {
	Path      PathEdit
	Authority string // "": as it was
}

// PathEdit makes another path of a request's.
type PathEdit struct {
	Kind  PathEditKind
	Value string // the replacement; of ReplaceRegex with \1 for the first group, \0 for the whole match and \\ for a backslash
	Regex string // RE2, what ReplaceRegex replaces; every match of it
}

// PathEditKind is what a PathEdit replaces.
type PathEditKind uint8

// The kinds of path edit.
const (
	KeepPath      PathEditKind = iota
	ReplaceFull                // the whole path (redirect.uri, ReplaceFullPath)
	ReplacePrefix              // the prefix that matched, or the whole path of an exact or regex match (rewrite.uri, prefixRewrite, ReplacePrefixMatch)
	ReplaceRegex               // what Regex matches (uriRegexRewrite)
)

// HeaderEdits are changes to the headers of a request and of its response.
type HeaderEdits struct{ Request, Response HeaderOps }

// HeaderOps are carried out in this order: Remove, Set, Add; each in the order given. To set host or :authority of a
// request is to rewrite its authority.
type HeaderOps struct {
	Remove []string // lower case
	Set    []Header
	Add    []Header
}

// Header is one line of a header.
type Header struct {
	Name   string // in lower case
	Value  string
	Format bool // Value is in the language of Envoy's command operators, of the request; set and add only
}

// Fraction is an exact part of the whole, Numerator/Denominator. The zero value is none of it.
type Fraction struct{ Numerator, Denominator uint32 }

// Fault is a failure made on purpose, before anything is sent to a backend; no timeout and no retry acts on it.
type Fault struct {
	Delay Delay
	Abort Abort
}

// Delay holds requests up. It is none when Percent is zero.
type Delay struct {
	Percent Fraction // delay.percentage
	Fixed   time.Duration
}

// Abort answers requests itself. It is none when Percent is zero.
type Abort struct {
	Percent    Fraction // abort.percentage
	HTTPStatus uint16   // 200–599; 0: GRPCStatus
	GRPCStatus uint32   // 0–16
}

// CORS says which origins' pages may call (Fetch standard, 3.2).
type CORS struct {
	AllowOrigins  []StringMatch // any of them; MatchPresence is every origin
	AllowMethods  []string      // "*": whatever is asked for
	AllowHeaders  []string      // "*": whatever is asked for
	ExposeHeaders []string
	MaxAge        *time.Duration // whole seconds a preflight may be remembered; nil: not said
	Credentials   bool

	// ForwardUnmatched sends preflights of other origins to the backend; else they are answered without any grant.
	ForwardUnmatched bool
}

// Mirror sends a copy of requests elsewhere and discards the response.
type Mirror struct {
	Ref     BackendRef
	Percent Fraction
}

// Retry is when a request is tried again, and how.
type Retry struct {
	Attempts uint32        // tries after the first one; 0: none
	On       RetryOn       // any of them; none, and no Codes: those of the mesh's default
	Codes    []uint16      // statuses to try again on: retriable-status-codes, retry.codes; 100–599
	Backoff  time.Duration // base; before the nth retry a random part of base×(2ⁿ-1), at most 10×base; 0: 25 ms

	OtherLocalities bool          // retryRemoteLocalities: prefer another priority after a failure
	PreviousHosts   PreviousHosts // retryIgnorePreviousHosts
}

// RetryOn is a set of conditions.
type RetryOn uint32

// The conditions, with Envoy's names beside them.
const (
	RetryOn5xx               RetryOn = 1 << iota // 5xx: also when no response came
	RetryOnGatewayError                          // gateway-error: 502, 503 and 504, also when no response came
	RetryOnReset                                 // reset: no response, for whatever reason
	RetryOnResetBefore                           // reset-before-request: nothing of the request was sent
	RetryOnConnectFailure                        // connect-failure
	RetryOnRatelimited                           // envoy-ratelimited
	RetryOnRetriable4xx                          // retriable-4xx: 409
	RetryOnRefusedStream                         // refused-stream: HTTP/2 REFUSED_STREAM
	RetryOnStatusCodes                           // retriable-status-codes: Retry.Codes
	RetryOnHeaders                               // retriable-headers
	RetryOnHTTP3PostConnect                      // http3-post-connect-failure
	RetryOnCancelled                             // gRPC cancelled
	RetryOnDeadlineExceeded                      // gRPC deadline-exceeded
	RetryOnInternal                              // gRPC internal
	RetryOnResourceExhausted                     // gRPC resource-exhausted
	RetryOnUnavailable                           // gRPC unavailable
	retryOnEnd
)

// RetryOnAll is the set of all conditions.
const RetryOnAll = retryOnEnd - 1

// PreviousHosts says whether a retry may go to an endpoint that has failed this request already.
type PreviousHosts uint8

// The choices.
const (
	PreviousHostsDefault PreviousHosts = iota // avoided, except where a hash names the endpoint
	PreviousHostsAvoid
	PreviousHostsAllow
)

// SessionPersistence keeps a client on the endpoint that answered it first (Gateway API, GEP-1619).
type SessionPersistence struct {
	Header    string        // name of the header that carries the endpoint, lower case; "": a cookie does
	Cookie    string        // name of the cookie; "" with neither: the implementation's choice
	Path      string        // of the cookie; "": the rule's
	Absolute  time.Duration // absoluteTimeout: how long the binding lasts; 0: no end
	Permanent bool          // lifetimeType: the cookie outlives the browser's session; needs Absolute
}

// StreamRule says where the connections go that it matches.
type StreamRule struct {
	Matches  []StreamMatch // any of them; none: every connection
	Backends []Backend     // only Ref and Weight count
}

// StreamMatch holds when every condition that is set does.
type StreamMatch struct {
	SNI             []string          // sniHosts, hostnames: name or *.suffix, any of them; TLS only
	Destinations    []netip.Prefix    // destinationSubnets: the address the client dialled; any of them
	Sources         []netip.Prefix    // sourceSubnet: the client's address; any of them
	Port            uint16            // of the service; 0: any
	SourceLabels    map[string]string // labels the client's workload carries
	SourceNamespace string            // "": any
}

// IsHeaderName reports whether a request or response may carry a header of that name: a token in lower case (RFC 9110,
// 5.1). A pseudo-header is not one.
func IsHeaderName(name string) bool {
	for i := range len(name) {
		c := name[i]
		if c <= ' ' || c >= 0x7f || 'A' <= c && c <= 'Z' || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return name != ""
}

// IsConnectionHeader reports whether a header, its name in lower case, is between two neighbours: about their connection, or about where a
// message on it ends (RFC 9110, 7.6.1; RFC 9112, 6). Who passes a message on writes his own, and rules have no say in it.
func IsConnectionHeader(name string) bool {
	switch name {
	case "connection", "content-length", "expect", "http2-settings", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade":
		return true
	}
	return false
}

// IsHeaderValue reports whether a header may have that value: no control character but the tab (RFC 9110, 5.5).
func IsHeaderValue(value string) bool {
	for i := range len(value) {
		if c := value[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
