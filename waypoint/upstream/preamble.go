package upstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/proxyproto"
	"github.com/mistnet/mistnet/internal/relay"
)

// What goes over a connection before what it is for, where a traffic policy wants it.

// announce tells the application who is at the other end.
func announce(conn net.Conn, version mesh.ProxyProtocol, from, to netip.AddrPort) error {
	h := proxyproto.Header{From: from, To: to}
	header := h.AppendV2(nil)
	if version == mesh.ProxyProtocolV1 {
		header = h.AppendV1(nil)
	}
	if _, err := conn.Write(header); err != nil {
		return fmt.Errorf("announce the client: %w", err)
	}
	return nil
}

// AskForward asks a forward proxy, at the other end of conn, for a connection to t (RFC 9110, 9.3.6). It owns conn: it is closed
// when that is refused.
func AskForward(ctx context.Context, conn relay.Conn, t *mesh.ForwardTunnel) (relay.Conn, error) {
	rest, err := connectForward(ctx, conn, t)
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("ask the forward proxy for %s: %w", t.TargetHost, err)
	}
	if len(rest) == 0 {
		return conn, nil
	}
	return &relay.Peeked{Conn: conn, Head: rest}, nil
}

func connectForward(ctx context.Context, conn relay.Conn, t *mesh.ForwardTunnel) (rest []byte, err error) {
	if t.Post {
		return nil, errors.New("POST is not spoken here")
	}
	if until, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(until)
	}
	authority := net.JoinHostPort(t.TargetHost, strconv.Itoa(int(t.TargetPort)))
	if _, err := fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority); err != nil {
		return nil, err
	}
	const maxHead = 16 << 10
	var head []byte
	for {
		var b [1024]byte
		n, err := conn.Read(b[:])
		head = append(head, b[:n]...)
		if end := bytes.Index(head, []byte("\r\n\r\n")); end >= 0 {
			rest, head = head[end+4:], head[:end+4]
			break
		}
		if err != nil {
			return nil, err
		}
		if len(head) > maxHead {
			return nil, errors.New("its answer does not end")
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: http.MethodConnect})
	if err != nil {
		return nil, err
	}
	_ = resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	return rest, conn.SetDeadline(time.Time{})
}
