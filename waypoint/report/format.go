package report

import (
	"net/netip"
	"strconv"
	"time"

	"github.com/mistnet/mistnet/internal/accesslog"
	"github.com/mistnet/mistnet/internal/mesh"
)

// Headers are those the access log's format asks for.
func (p *Reporter) Headers() []accesslog.Header {
	if p.access == nil || p.access.format == nil {
		return nil
	}
	return p.access.format.Headers
}

// appendFormat is a line as the mesh's format wants it. What clients wrote cannot end a line, nor a string of JSON.
func (l *accessLog) appendFormat(b []byte, r *Record, took time.Duration) []byte {
	for i := range l.format.Parts {
		if p := &l.format.Parts[i]; p.Op == accesslog.Literal {
			b = append(b, p.Text...)
		} else {
			b = l.appendPart(b, p, r, took)
		}
	}
	return b
}

// value is that of an operator: a number, a text that is to be escaped, or something that need not be.
type value struct {
	kind   kind
	number int64
	text   string
	addr   netip.AddrPort
	id     mesh.Identity
}

type kind uint8

const (
	isUnset kind = iota
	isNumber
	isText
	isWord // a text without blanks
	isAddress
	isHost // of an address
	isIdentity
	isCluster
	isStart
	isEnd
)

// AppendOperator writes what an operator that asks for no header stands for, in a header; nothing where there is nothing.
func (r *Record) AppendOperator(b []byte, p *accesslog.Part, host string) []byte {
	took := time.Since(r.Start)
	switch v := valueOf(p, r, took, host); v.kind {
	case isUnset:
		return b
	case isNumber:
		return strconv.AppendInt(b, v.number, 10)
	default:
		return v.append(b, p, r, took)
	}
}

func (l *accessLog) appendPart(b []byte, p *accesslog.Part, r *Record, took time.Duration) []byte {
	v := valueOf(p, r, took, l.host)
	switch {
	case v.kind == isUnset && p.Place == accesslog.AsJSON:
		return append(b, "null"...)
	case v.kind == isUnset:
		return append(b, '-')
	case v.kind == isNumber:
		return strconv.AppendInt(b, v.number, 10)
	case p.Place == accesslog.AsJSON:
		return append(v.append(append(b, '"'), p, r, took), '"')
	}
	return v.append(b, p, r, took)
}

// append writes a value that is set and no number.
func (v *value) append(b []byte, p *accesslog.Part, r *Record, took time.Duration) []byte {
	switch v.kind {
	case isAddress:
		return v.addr.AppendTo(b)
	case isHost:
		return v.addr.Addr().AppendTo(b)
	case isIdentity:
		b = append(append(b, "spiffe://"...), v.id.TrustDomain...)
		b = append(append(b, "/ns/"...), v.id.Namespace...)
		return append(append(b, "/sa/"...), v.id.ServiceAccount...)
	case isCluster:
		return r.appendCluster(b)
	case isStart:
		return p.AppendTime(b, r.Start)
	case isEnd:
		return p.AppendTime(b, r.Start.Add(took))
	}
	text, from := v.text, len(b)
	if p.Most > 0 && len(text) > p.Most {
		text = text[:p.Most]
	}
	switch p.Place {
	case accesslog.InText:
		b = appendField(b, text)
	case accesslog.InHeader:
		b = append(b, accesslog.Printable(text)...)
	default:
		b = appendEscaped(b, text)
	}
	for i := from; v.kind == isWord && i < len(b); i++ {
		if b[i] == ' ' {
			b[i] = '_'
		}
	}
	return b
}

func numberOf(n int64) value { return value{kind: isNumber, number: n} }

func textOf(s string) value {
	if s == "" {
		return value{}
	}
	return value{kind: isText, text: s}
}

func wordOf(s string) value {
	v := textOf(s)
	if v.kind == isText {
		v.kind = isWord
	}
	return v
}

func addressOf(a netip.AddrPort, k kind) value {
	if !a.IsValid() {
		return value{}
	}
	return value{kind: k, addr: a, number: int64(a.Port())}
}

// valueOf is the value of a part that is not literal, at the pod of that name.
func valueOf(p *accesslog.Part, r *Record, took time.Duration, host string) value {
	switch p.Op {
	case accesslog.FromHeader:
		if p.At < len(r.Headers) {
			return textOf(r.Headers[p.At])
		}
	case accesslog.StartTime:
		return value{kind: isStart}
	case accesslog.EmitTime:
		return value{kind: isEnd}
	case accesslog.Protocol:
		return textOf(r.Protocol)
	case accesslog.ResponseCode:
		return numberOf(int64(r.Status))
	case accesslog.ResponseCodeDetails:
		details, _ := r.ends()
		if p.Style != "" {
			return textOf(details)
		}
		return wordOf(details)
	case accesslog.ConnectionTerminationDetails:
		_, details := r.ends()
		return wordOf(details)
	case accesslog.ResponseFlags:
		if r.Flags != "-" {
			return textOf(r.Flags)
		}
	case accesslog.UpstreamTransportFailureReason:
		return textOf(r.Failure)
	case accesslog.GRPCStatus:
		return grpcStatusAs(r.GRPCStatus, p.Style)
	case accesslog.RouteName:
		if r.Route != nil {
			return wordOf(r.Route.Name())
		}
	case accesslog.UpstreamCluster:
		if r.Service != nil {
			return value{kind: isCluster}
		}
	case accesslog.RequestedServerName:
		return wordOf(r.SNI)
	case accesslog.Hostname:
		return textOf(host)
	case accesslog.DownstreamPeerURISAN:
		id := r.Client.ID
		if g := r.Client.Gateway; g != nil {
			id = g.ID // whose certificate was shown
		}
		if !id.IsZero() {
			return value{kind: isIdentity, id: id}
		}
	default:
		if v := amountOf(p.Op, r, took); v.kind != isUnset {
			return v
		}
		return placeOf(p.Op, r)
	}
	return value{}
}

// amountOf is the value of an operator that counts something.
func amountOf(op accesslog.Operator, r *Record, took time.Duration) value {
	received, sent := r.amounts()
	switch op {
	case accesslog.BytesReceived:
		return numberOf(received)
	case accesslog.BytesSent:
		return numberOf(sent)
	case accesslog.Duration:
		return numberOf(took.Milliseconds())
	case accesslog.ResponseDuration:
		if r.Answered {
			return numberOf(r.Responded.Milliseconds())
		}
	case accesslog.ResponseTxDuration:
		if r.Answered {
			return numberOf((took - r.Responded).Milliseconds())
		}
	case accesslog.UpstreamRequestAttemptCount:
		return numberOf(int64(r.Attempts))
	}
	return value{}
}

// placeOf is the value of an operator that names an end of a connection.
func placeOf(op accesslog.Operator, r *Record) value {
	switch op {
	case accesslog.UpstreamHost:
		return addressOf(r.Upstream, isAddress)
	case accesslog.UpstreamHostWithoutPort:
		return addressOf(r.Upstream, isHost)
	case accesslog.UpstreamPort:
		return addressOf(r.Upstream, isNumber)
	case accesslog.DownstreamRemoteAddress:
		return addressOf(r.Client.Addr, isAddress)
	case accesslog.DownstreamRemoteAddressWithoutPort:
		return addressOf(r.Client.Addr, isHost)
	case accesslog.DownstreamRemotePort:
		return addressOf(r.Client.Addr, isNumber)
	case accesslog.DownstreamLocalAddress:
		return addressOf(r.Local, isAddress)
	case accesslog.DownstreamLocalAddressWithoutPort:
		return addressOf(r.Local, isHost)
	case accesslog.DownstreamLocalPort:
		return addressOf(r.Local, isNumber)
	}
	return value{}
}

// grpcNames are the names of gRPC's status codes, as Envoy's log has them and as gRPC's specification does.
var grpcNames = [...][2]string{
	{"OK", "OK"}, {"Canceled", "CANCELLED"}, {"Unknown", "UNKNOWN"}, {"InvalidArgument", "INVALID_ARGUMENT"},
	{"DeadlineExceeded", "DEADLINE_EXCEEDED"}, {"NotFound", "NOT_FOUND"}, {"AlreadyExists", "ALREADY_EXISTS"},
	{"PermissionDenied", "PERMISSION_DENIED"}, {"ResourceExhausted", "RESOURCE_EXHAUSTED"},
	{"FailedPrecondition", "FAILED_PRECONDITION"}, {"Aborted", "ABORTED"}, {"OutOfRange", "OUT_OF_RANGE"},
	{"Unimplemented", "UNIMPLEMENTED"}, {"Internal", "INTERNAL"}, {"Unavailable", "UNAVAILABLE"}, {"DataLoss", "DATA_LOSS"},
	{"Unauthenticated", "UNAUTHENTICATED"},
}

func grpcStatusAs(status, style string) value {
	if status == "" {
		return value{}
	}
	n, err := strconv.Atoi(status)
	if err != nil {
		return value{}
	}
	switch {
	case style == accesslog.StyleNumber, n < 0, n >= len(grpcNames):
		return numberOf(int64(n))
	case style == accesslog.StyleSnake:
		return textOf(grpcNames[n][1])
	}
	return textOf(grpcNames[n][0])
}
