package accesslog

// Operator is what a part says of a request or connection.
type Operator uint8

// The operators, under the names of Envoy's. Those of one value in several forms are the same value.
const (
	Literal    Operator = iota + 1 // what the format says itself
	Never                          // always not set
	FromHeader                     // REQ, RESP, TRAILER
	StartTime
	EmitTime
	Protocol
	ResponseCode
	ResponseCodeDetails
	ConnectionTerminationDetails
	ResponseFlags
	UpstreamTransportFailureReason
	GRPCStatus
	BytesReceived
	BytesSent
	Duration
	ResponseDuration
	ResponseTxDuration
	UpstreamRequestAttemptCount
	RouteName
	UpstreamCluster
	UpstreamHost
	UpstreamHostWithoutPort
	UpstreamPort
	DownstreamRemoteAddress
	DownstreamRemoteAddressWithoutPort
	DownstreamRemotePort
	DownstreamLocalAddress
	DownstreamLocalAddressWithoutPort
	DownstreamLocalPort
	DownstreamPeerURISAN
	RequestedServerName
	Hostname
)

// operator is how an operator may be written.
type operator struct {
	op   Operator
	of   Section  // of FromHeader
	cut  bool     // it may have a length
	args []string // that it may have, where they are few; of GRPCStatus the first is the default
}

const withoutQuery = "REQ_WITHOUT_QUERY"

// operators are those that may be written. It is read only.
var operators = func() map[string]operator {
	all := map[string]operator{
		"REQ":        {op: FromHeader, of: Request, cut: true},
		withoutQuery: {op: FromHeader, of: Request, cut: true},
		"RESP":       {op: FromHeader, of: Response, cut: true},
		"TRAILER":    {op: FromHeader, of: Trailer, cut: true},

		"START_TIME":                             {op: StartTime},
		"EMIT_TIME":                              {op: EmitTime},
		"PROTOCOL":                               {op: Protocol},
		"RESPONSE_CODE":                          {op: ResponseCode},
		"RESPONSE_CODE_DETAILS":                  {op: ResponseCodeDetails, args: []string{"ALLOW_WHITESPACES"}},
		"CONNECTION_TERMINATION_DETAILS":         {op: ConnectionTerminationDetails},
		"RESPONSE_FLAGS":                         {op: ResponseFlags},
		"UPSTREAM_TRANSPORT_FAILURE_REASON":      {op: UpstreamTransportFailureReason, cut: true},
		"GRPC_STATUS":                            {op: GRPCStatus, args: []string{StyleCamel, StyleSnake, StyleNumber}},
		"GRPC_STATUS_NUMBER":                     {op: GRPCStatus, args: []string{StyleNumber}},
		"BYTES_RECEIVED":                         {op: BytesReceived},
		"BYTES_SENT":                             {op: BytesSent},
		"DURATION":                               {op: Duration},
		"RESPONSE_DURATION":                      {op: ResponseDuration},
		"RESPONSE_TX_DURATION":                   {op: ResponseTxDuration},
		"UPSTREAM_REQUEST_ATTEMPT_COUNT":         {op: UpstreamRequestAttemptCount},
		"ROUTE_NAME":                             {op: RouteName},
		"UPSTREAM_CLUSTER":                       {op: UpstreamCluster},
		"UPSTREAM_CLUSTER_RAW":                   {op: UpstreamCluster},
		"UPSTREAM_HOST":                          {op: UpstreamHost},
		"UPSTREAM_REMOTE_ADDRESS":                {op: UpstreamHost},
		"UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT":   {op: UpstreamHostWithoutPort},
		"UPSTREAM_REMOTE_PORT":                   {op: UpstreamPort},
		"DOWNSTREAM_REMOTE_ADDRESS":              {op: DownstreamRemoteAddress},
		"DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": {op: DownstreamRemoteAddressWithoutPort},
		"DOWNSTREAM_REMOTE_PORT":                 {op: DownstreamRemotePort},
		"DOWNSTREAM_LOCAL_ADDRESS":               {op: DownstreamLocalAddress},
		"DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT":  {op: DownstreamLocalAddressWithoutPort},
		"DOWNSTREAM_LOCAL_PORT":                  {op: DownstreamLocalPort},
		"DOWNSTREAM_PEER_URI_SAN":                {op: DownstreamPeerURISAN},
		"REQUESTED_SERVER_NAME":                  {op: RequestedServerName},
		"HOSTNAME":                               {op: Hostname},
	}
	for _, name := range never {
		all[name] = operator{op: Never, cut: true}
	}
	return all
}()

// The ways to write a gRPC status.
const (
	StyleCamel  = "CAMEL_STRING" // PermissionDenied
	StyleSnake  = "SNAKE_STRING" // PERMISSION_DENIED
	StyleNumber = "NUMBER"       // 7
)

// never are the operators that Envoy has and whose value is not known here, whatever their arguments say. A format that has them
// is honoured but for them.
var never = []string{
	"UPSTREAM_LOCAL_ADDRESS", "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", "UPSTREAM_LOCAL_PORT", "UPSTREAM_PROTOCOL", "UPSTREAM_HOST_NAME",
	"UPSTREAM_HOST_NAME_WITHOUT_PORT", "UPSTREAM_METADATA", "UPSTREAM_CONNECTION_ID", "UPSTREAM_CONNECTION_POOL_READY_DURATION",
	"UPSTREAM_TLS_VERSION", "UPSTREAM_TLS_CIPHER", "UPSTREAM_TLS_SESSION_ID", "UPSTREAM_PEER_SUBJECT", "UPSTREAM_PEER_ISSUER",
	"UPSTREAM_PEER_CERT", "UPSTREAM_PEER_URI_SAN", "UPSTREAM_PEER_DNS_SAN", "UPSTREAM_LOCAL_URI_SAN", "UPSTREAM_LOCAL_SUBJECT",
	"UPSTREAM_WIRE_BYTES_SENT", "UPSTREAM_WIRE_BYTES_RECEIVED", "UPSTREAM_HEADER_BYTES_SENT", "UPSTREAM_HEADER_BYTES_RECEIVED",
	"DOWNSTREAM_DIRECT_REMOTE_ADDRESS", "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", "DOWNSTREAM_DIRECT_REMOTE_PORT",
	"DOWNSTREAM_DIRECT_LOCAL_ADDRESS", "DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT", "DOWNSTREAM_DIRECT_LOCAL_PORT",
	"DOWNSTREAM_TLS_VERSION", "DOWNSTREAM_TLS_CIPHER", "DOWNSTREAM_TLS_SESSION_ID", "DOWNSTREAM_LOCAL_URI_SAN", "DOWNSTREAM_LOCAL_DNS_SAN",
	"DOWNSTREAM_LOCAL_SUBJECT", "DOWNSTREAM_PEER_SUBJECT", "DOWNSTREAM_PEER_ISSUER", "DOWNSTREAM_PEER_CERT", "DOWNSTREAM_PEER_SERIAL",
	"DOWNSTREAM_PEER_DNS_SAN", "DOWNSTREAM_PEER_FINGERPRINT_256", "DOWNSTREAM_PEER_FINGERPRINT_1", "DOWNSTREAM_PEER_CERT_V_START",
	"DOWNSTREAM_PEER_CERT_V_END", "DOWNSTREAM_TRANSPORT_FAILURE_REASON", "DOWNSTREAM_LOCAL_CLOSE_REASON", "DOWNSTREAM_HANDSHAKE_DURATION",
	"DOWNSTREAM_WIRE_BYTES_SENT", "DOWNSTREAM_WIRE_BYTES_RECEIVED", "DOWNSTREAM_HEADER_BYTES_SENT", "DOWNSTREAM_HEADER_BYTES_RECEIVED",
	"REQUEST_HEADERS_BYTES", "RESPONSE_HEADERS_BYTES", "RESPONSE_TRAILERS_BYTES", "REQUEST_DURATION", "REQUEST_TX_DURATION",
	"COMMON_DURATION", "ROUNDTRIP_DURATION", "BYTES_RETRANSMITTED", "PACKETS_RETRANSMITTED", "RESPONSE_FLAGS_LONG", "LOCAL_REPLY_BODY",
	"DYNAMIC_METADATA", "CLUSTER_METADATA", "METADATA", "FILTER_STATE", "UPSTREAM_FILTER_STATE", "CEL", "ENVIRONMENT", "TRACE_ID",
	"FILTER_CHAIN_NAME", "VIRTUAL_CLUSTER_NAME", "CONNECTION_ID", "STREAM_ID", "UNIQUE_ID", "ACCESS_LOG_TYPE", "TLS_JA3_FINGERPRINT",
}
