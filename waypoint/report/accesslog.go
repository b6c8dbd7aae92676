package report

import (
	"io"
	"net/netip"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
)

// accessLog writes the line of each request and connection, in Istio's format: text, or an object of JSON.
type accessLog struct {
	out    io.Writer // takes a line at a time, from many goroutines
	json   bool
	format *accesslog.Format // that the mesh asks for; nil: Istio's default
	host   string            // of this waypoint, for that format
}

// newAccessLog is the access log of that kind; nil: none. A format that cannot be read is not worth a waypoint: istiod, which may be
// newer, has said of the mesh's what is wrong with it.
func newAccessLog(cfg Config, log *zap.Logger) *accessLog {
	if cfg.Out == nil {
		return nil
	}
	l := &accessLog{out: cfg.Out, json: cfg.JSON, host: cfg.Host}
	if cfg.Format == "" {
		return l
	}
	parse := accesslog.ParseText
	if l.json {
		parse = accesslog.ParseJSON
	}
	format, err := parse(cfg.Format)
	if err != nil {
		log.Error("format of the access log cannot be read, its default holds", zap.Error(err))
	}
	l.format = format
	return l
}

// lines are buffers for lines.
var lines = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

func (l *accessLog) write(r *Record, took time.Duration) {
	b := lines.Get().(*[]byte)
	switch {
	case l.format != nil:
		*b = l.appendFormat((*b)[:0], r, took)
	case l.json:
		*b = r.appendJSON((*b)[:0], took)
	default:
		*b = r.appendText((*b)[:0], took)
	}
	_, _ = l.out.Write(*b)
	lines.Put(b)
}

// startFormat is Envoy's START_TIME.
const startFormat = "2006-01-02T15:04:05.000Z"

// appendText is Istio's default format:
//
//	[start] "METHOD path PROTOCOL" code flags details termination "failure" received sent duration upstream_time "xff" "agent"
//	"request-id" "authority" "upstream" cluster upstream_local local remote sni route
//
// What is not there is "-". What clients wrote cannot end a field: quotes and what is not printable are escaped.
func (r *Record) appendText(b []byte, took time.Duration) []byte {
	b = append(b, '[')
	b = r.Start.UTC().AppendFormat(b, startFormat)
	b = append(b, `] "`...)
	b = appendField(b, r.Method)
	b = appendField(append(b, ' '), r.Target)
	b = appendField(append(b, ' '), r.Protocol)
	b = append(b, `" `...)
	b = strconv.AppendInt(b, int64(r.Status), 10)
	b = appendField(append(b, ' '), r.Flags)
	details, termination := r.ends()
	b = appendWord(append(b, ' '), details)
	b = appendWord(append(b, ' '), termination)
	b = appendField(append(b, ` "`...), r.Failure)
	received, sent := r.amounts()
	b = append(b, `" `...)
	b = strconv.AppendInt(b, received, 10)
	b = strconv.AppendInt(append(b, ' '), sent, 10)
	b = strconv.AppendInt(append(b, ' '), took.Milliseconds(), 10)
	b = append(b, ' ')
	if r.Answered {
		b = strconv.AppendInt(b, r.UpstreamTime.Milliseconds(), 10)
	} else {
		b = append(b, '-')
	}
	for _, v := range [...]string{r.ForwardedFor, r.UserAgent, r.RequestID, r.Authority} {
		b = appendField(append(b, ` "`...), v)
		b = append(b, '"')
	}
	b = appendAddr(append(b, ` "`...), r.Upstream)
	b = r.appendCluster(append(b, `" `...))
	b = appendAddr(append(b, " - "...), r.Local) // the address of this end of the upstream's connection is not told
	b = appendAddr(append(b, ' '), r.Client.Addr)
	b = appendWord(append(b, ' '), r.SNI)
	b = append(b, ' ')
	if r.Route == nil {
		b = append(b, '-')
	} else {
		b = appendWord(b, r.Route.Name())
	}
	return append(b, '\n')
}

// appendJSON has the names Istio gives the same in accessLogEncoding JSON, and, beyond them, who the client and its workload's
// counterpart are. What is not there is left out.
func (r *Record) appendJSON(b []byte, took time.Duration) []byte {
	b = append(b, `{"start_time":"`...)
	b = r.Start.UTC().AppendFormat(b, startFormat)
	b = append(b, '"')
	str := func(key, value string) {
		if value != "" {
			b = appendJSONString(append(append(append(b, `,"`...), key...), `":`...), value)
		}
	}
	num := func(key string, value int64) {
		b = strconv.AppendInt(append(append(append(b, `,"`...), key...), `":`...), value, 10)
	}
	addr := func(key string, a netip.AddrPort) {
		if a.IsValid() {
			b = append(appendAddr(append(append(append(b, `,"`...), key...), `":"`...), a), '"')
		}
	}
	str("method", r.Method)
	str("path", r.Target)
	str("protocol", r.Protocol)
	num("response_code", int64(r.Status))
	str("grpc_status", r.GRPCStatus)
	str("response_flags", r.Flags)
	details, termination := r.ends()
	str("response_code_details", details)
	str("connection_termination_details", termination)
	str("upstream_transport_failure_reason", r.Failure)
	received, sent := r.amounts()
	num("bytes_received", received)
	num("bytes_sent", sent)
	num("duration", took.Milliseconds())
	if r.Answered {
		num("upstream_service_time", r.UpstreamTime.Milliseconds())
	}
	str("x_forwarded_for", r.ForwardedFor)
	str("user_agent", r.UserAgent)
	str("request_id", r.RequestID)
	str("authority", r.Authority)
	addr("upstream_host", r.Upstream)
	if r.Service != nil {
		b = append(r.appendCluster(append(b, `,"upstream_cluster":"`...)), '"')
	}
	addr("downstream_local_address", r.Local)
	addr("downstream_remote_address", r.Client.Addr)
	str("requested_server_name", r.SNI)
	if r.Route != nil {
		str("route_name", r.Route.Name())
	}
	str("src.identity", r.Client.ID.String())
	if w := r.Client.Workload; w != nil {
		str("src.workload", w.Name)
	}
	if g := r.Client.Gateway; g != nil {
		str("src.gateway", g.ID.String())
	}
	if w := r.Workload; w != nil {
		str("dst.workload", w.Name)
	}
	if r.Attempts > 1 {
		num("attempts", int64(r.Attempts))
	}
	return append(b, "}\n"...)
}

// ends are why a request, or else a connection, ended as it did.
func (r *Record) ends() (details, termination string) {
	if r.HTTP {
		return r.Details, ""
	}
	return "", r.Details
}

// amounts are the bytes of bodies, or those of a connection, and of one that was HTTP once both.
func (r *Record) amounts() (received, sent int64) {
	return r.Received + r.Bytes.AToB.Load(), r.Sent + r.Bytes.BToA.Load()
}

// appendCluster is how Istio's waypoints call a backend.
func (r *Record) appendCluster(b []byte) []byte {
	if r.Service == nil {
		return append(b, '-')
	}
	b = strconv.AppendUint(append(b, "inbound-vip|"...), uint64(r.port), 10)
	switch {
	case !r.HTTP:
		b = append(b, "|tcp|"...)
	case r.subset != "":
		b = append(append(append(b, "|http/"...), r.subset...), '|')
	default:
		b = append(b, "|http|"...)
	}
	return append(b, r.Service.Hostname...)
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	if !a.IsValid() {
		return append(b, '-')
	}
	return a.AppendTo(b)
}

// maxLogged is how many bytes of what a client wrote are logged; "..." stands for the rest. A head may be 60 KiB of what takes
// four bytes to escape, and every request writes a line.
const maxLogged = 4 << 10

// logged is the beginning of a text, and what to write behind it.
func logged(s string) (begin, rest string) {
	if len(s) <= maxLogged {
		return s, ""
	}
	return s[:maxLogged], "..."
}

const hexDigits = "0123456789abcdef"

// appendField is a text between quotes; "-" when it is empty.
func appendField(b []byte, s string) []byte {
	if s == "" {
		return append(b, '-')
	}
	s, rest := logged(s)
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ' || c > '~':
			b = append(b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		default:
			b = append(b, c)
		}
	}
	return append(b, rest...)
}

// appendWord is a text between blanks: it has none itself. "-" when it is empty.
func appendWord(b []byte, s string) []byte {
	from := len(b)
	b = appendField(b, s)
	for i := from; i < len(b); i++ {
		if b[i] == ' ' {
			b[i] = '_'
		}
	}
	return b
}

// appendJSONString is a string of JSON. What is no UTF-8 is replaced.
func appendJSONString(b []byte, s string) []byte {
	return append(appendEscaped(append(b, '"'), s), '"')
}

// appendEscaped is what such a string has between its quotes.
func appendEscaped(b []byte, s string) []byte {
	s, rest := logged(s)
	for _, c := range s {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', byte(c))
		case c < ' ' || c == 0x7f:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		default:
			b = utf8.AppendRune(b, c)
		}
	}
	return append(b, rest...)
}
