package waypoint_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// upgraded opens a connection to cart and makes it one of the protocol "echo", at a path.
func (l *lab) upgraded(path string) net.Conn {
	l.t.Helper()
	s, err := l.open(l.t.Context(), "10.9.0.1:80")
	if err != nil {
		l.t.Fatal(err)
	}
	fmt.Fprintf(s, "GET %s HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", path)
	r := bufio.NewReader(s)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		l.t.Fatalf("upgrade: %v, %v", resp, err)
	}
	return s
}

// echoes reports whether what is said comes back.
func echoes(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "ping"); err != nil {
		return err
	}
	var b [4]byte
	_, err := io.ReadFull(c, b[:])
	return err
}

// TestWhatLastsIsJudgedAgain: connections that are not HTTP, or no longer are, end when policies no longer allow them. Those
// that policies still allow live on.
func TestWhatLastsIsJudgedAgain(t *testing.T) {
	t.Parallel()
	l := newLab(t, nil)
	cart := l.service("cart", "10.9.0.1", mesh.AppHTTP1, app(t, func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_, _ = io.Copy(conn, rw)
	}))
	ln := listen(t, loopback()+":0")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	db := l.service("db", "10.9.0.2", mesh.AppTCP, addrPort(ln.Addr()))
	l.known("cart", "db")
	stream := func() net.Conn {
		s, err := l.open(t.Context(), "10.9.0.2:80")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	open, shut, tcp := l.upgraded("/open"), l.upgraded("/shut"), stream()
	alive := func(what string, conns ...net.Conn) {
		t.Helper()
		for i, c := range conns {
			if err := echoes(c); err != nil {
				t.Fatalf("%s: connection %d: %v", what, i, err)
			}
		}
	}
	alive("without policies", open, shut, tcp)

	l.policy("no-shut", mesh.Deny, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/shut"})
	l.guarded(cart, "shop/no-shut")
	l.eventually("the one that is denied ends", func() bool { return echoes(shut) != nil })
	alive("the other's path is not denied", open, tcp)

	// What is not known yet ends nothing, and a policy for requests that lets some in lets no connection in.
	l.guarded(db, "shop/read")
	l.eventually("known to be not known", func() bool { return strings.Contains(l.page(":15000/config_dump"), `"shop/read"`) })
	alive("its policy is not known", tcp)
	l.policy("read", mesh.Allow, mesh.StringMatch{Kind: mesh.MatchPrefix, Value: "/read"})
	l.eventually("the connection ends", func() bool { return echoes(tcp) != nil })
	alive("another service", open)
	l.eventually("the access log says why", func() bool {
		return strings.Contains(l.log.String(), `"connection_termination_details":"rbac_access_denied_matched_policy[none]"`) &&
			strings.Contains(l.log.String(), `rbac_access_denied_matched_policy[ns[shop]-policy[no-shut]]`)
	})
	if s, err := l.open(t.Context(), "10.9.0.2:80"); err == nil {
		s.Close()
		t.Error("a new connection to db is accepted, want it denied")
	}
	open.Close()
}
