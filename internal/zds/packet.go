package zds

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	zdsapi "github.com/mistnet/mistnet/api/zds"
)

const (
	// maxPacketBytes is what either side reads at most; more is an error, not a fragment.
	maxPacketBytes = 1024
	// maxFiles is how many descriptors are taken off a packet so that too many can be told from one. The kernel drops
	// what does not fit.
	maxFiles = 4
)

// errProtocol is wrapped by what only a broken or hostile peer does; the connection ends.
var errProtocol = errors.New("protocol error")

// packetConn sends and receives packets with descriptors. One goroutine may receive while another sends.
type packetConn struct {
	*net.UnixConn
}

// receive reads one packet and the files that came with it. The caller owns the files. On an error there are none.
func (c packetConn) receive(buf []byte) ([]byte, []*os.File, error) {
	oob := make([]byte, syscall.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf[:maxPacketBytes], oob) // descriptors come with close-on-exec set
	// Descriptors may sit on a packet that is refused for another reason, even on an empty one, which reads as the end.
	files, ferr := filesOf(oob[:oobn])
	switch {
	case err != nil:
	case ferr != nil:
		err = ferr
	case n == 0:
		err = io.EOF
	case flags&syscall.MSG_TRUNC != 0:
		err = fmt.Errorf("%w: packet of more than %d bytes", errProtocol, maxPacketBytes)
	case flags&syscall.MSG_CTRUNC != 0:
		err = fmt.Errorf("%w: packet with more than %d descriptors", errProtocol, maxFiles)
	}
	if err != nil {
		closeAll(files)
		return nil, nil, err
	}
	return buf[:n], files, nil
}

// filesOf turns a control message into files; whatever it could read is returned also with an error.
func filesOf(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: control message: %w", errProtocol, err)
	}
	var files []*os.File
	var errs error
	for i := range msgs {
		fds, err := syscall.ParseUnixRights(&msgs[i])
		if err != nil {
			errs = fmt.Errorf("%w: control message of another kind", errProtocol)
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "pod network namespace"))
		}
	}
	return files, errs
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// send writes one packet, with file's descriptor unless it is nil.
func (c packetConn) send(m proto.Message, file *os.File, timeout time.Duration) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return &notSentError{fmt.Errorf("encode packet: %w", err)}
	}
	if len(b) > maxPacketBytes {
		return &notSentError{fmt.Errorf("encode packet: %d bytes, more than %d", len(b), maxPacketBytes)}
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if file == nil {
		_, _, err = c.WriteMsgUnix(b, nil, nil)
		return err
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return &notSentError{err}
	}
	var werr error
	if err := raw.Control(func(fd uintptr) { _, _, werr = c.WriteMsgUnix(b, syscall.UnixRights(int(fd)), nil) }); err != nil {
		return &notSentError{fmt.Errorf("pod's network namespace: %w", os.ErrClosed)}
	}
	return werr
}

// notSentError says that a packet could not even be made; the connection is as it was.
type notSentError struct{ err error }

func (e *notSentError) Error() string { return e.err.Error() }
func (e *notSentError) Unwrap() error { return e.err }

// decodeHello reads ztunnel's first packet.
func decodeHello(b []byte) error {
	var m zdsapi.ZdsHello
	if err := proto.Unmarshal(b, &m); err != nil {
		return fmt.Errorf("%w: hello: %w", errProtocol, err)
	}
	if m.GetVersion() != zdsapi.Version_V1 {
		return fmt.Errorf("%w: hello with version %v, want V1", errProtocol, m.GetVersion())
	}
	return nil
}

// step is one decoded request.
type step struct {
	kind stepKind
	info Info // only UID is set unless the step is an add
}

// stepKind is what a request asks for.
type stepKind int

const (
	stepUnknown stepKind = iota
	stepAdd
	stepKeep
	stepDel
	stepSnapshotSent
)

func (k stepKind) String() string {
	switch k {
	case stepAdd:
		return "add"
	case stepKeep:
		return "keep"
	case stepDel:
		return "del"
	case stepSnapshotSent:
		return "snapshot sent"
	case stepUnknown:
	}
	return "unknown"
}

// decodeRequest reads a packet of the agent's that came with files descriptors.
func decodeRequest(b []byte, files int) (step, error) {
	var m zdsapi.WorkloadRequest
	if err := proto.Unmarshal(b, &m); err != nil {
		return step{}, fmt.Errorf("%w: request: %w", errProtocol, err)
	}
	var s step
	switch p := m.GetPayload().(type) {
	case *zdsapi.WorkloadRequest_Add:
		info := p.Add.GetWorkloadInfo()
		if info == nil {
			return step{}, fmt.Errorf("%w: add without workload_info", errProtocol)
		}
		s = step{stepAdd, Info{p.Add.GetUid(), info.GetName(), info.GetNamespace(), info.GetServiceAccount()}}
		if files != 1 {
			return step{}, fmt.Errorf("%w: add with %d descriptors, want one", errProtocol, files)
		}
	case *zdsapi.WorkloadRequest_Keep:
		s = step{stepKeep, Info{UID: p.Keep.GetUid()}}
	case *zdsapi.WorkloadRequest_Del:
		s = step{stepDel, Info{UID: p.Del.GetUid()}}
	case *zdsapi.WorkloadRequest_SnapshotSent:
		s = step{kind: stepSnapshotSent}
	default:
		return step{}, fmt.Errorf("%w: request of an unknown kind", errProtocol)
	}
	if s.kind != stepAdd && files != 0 {
		return step{}, fmt.Errorf("%w: %v with %d descriptors, want none", errProtocol, s.kind, files)
	}
	if s.kind != stepSnapshotSent && s.info.UID == "" {
		return step{}, fmt.Errorf("%w: %v without uid", errProtocol, s.kind)
	}
	return s, nil
}

// decodeResponse reads ztunnel's answer. The string is its complaint, "" for none.
func decodeResponse(b []byte) (string, error) {
	var m zdsapi.WorkloadResponse
	if err := proto.Unmarshal(b, &m); err != nil {
		return "", fmt.Errorf("%w: response: %w", errProtocol, err)
	}
	ack, ok := m.GetPayload().(*zdsapi.WorkloadResponse_Ack)
	if !ok {
		return "", fmt.Errorf("%w: response that is no ack", errProtocol)
	}
	return ack.Ack.GetError(), nil
}

func addRequest(i Info) *zdsapi.WorkloadRequest {
	return &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: &zdsapi.AddWorkload{
		Uid:          i.UID,
		WorkloadInfo: &zdsapi.WorkloadInfo{Name: i.Name, Namespace: i.Namespace, ServiceAccount: i.ServiceAccount},
	}}}
}

func keepRequest(uid string) *zdsapi.WorkloadRequest {
	return &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Keep{Keep: &zdsapi.KeepWorkload{Uid: uid}}}
}

func delRequest(uid string) *zdsapi.WorkloadRequest {
	return &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{Uid: uid}}}
}

func snapshotSentRequest() *zdsapi.WorkloadRequest {
	return &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}}
}

// ackResponse shortens a complaint so that the packet always fits.
func ackResponse(err error) *zdsapi.WorkloadResponse {
	ack := &zdsapi.Ack{}
	if err != nil {
		ack.Error = shorten(err.Error(), maxPacketBytes/2)
	}
	return &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: ack}}
}

// shorten cuts s to at most n bytes of valid UTF-8, which protobuf insists on. It never returns "", which would mean success.
func shorten(s string, n int) string {
	s = strings.ToValidUTF8(s, "?")
	if s == "" {
		return "failed without a reason"
	}
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "")
}
