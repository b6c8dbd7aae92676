package record_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

func TestCryptoTLSIsTheOtherEnd(t *testing.T) {
	for _, role := range []record.Role{record.Client, record.Server} {
		for _, tickets := range []bool{false, true} {
			if tickets && role == record.Server {
				continue // whoever sends tickets is not taken over
			}
			t.Run(fmt.Sprintf("we are %v, tickets %v", role, tickets), func(t *testing.T) {
				a, b := tcpPair(t)
				cfg := config()
				cfg.SessionTicketsDisabled = !tickets
				peer := tls.Server(b, cfg)
				if role == record.Server {
					peer = tls.Client(b, cfg)
				}
				var work sync.WaitGroup
				work.Go(func() {
					defer peer.Close()
					if _, err := io.Copy(peer, peer); err != nil {
						t.Errorf("peer: %v", err)
					}
				})
				e := takeOver(t, a, role, config())
				if err := e.update(true); err != nil { // crypto/tls answers and renews its key too
					t.Fatal(err)
				}
				rng := rand.New(rand.NewPCG(3, 4))
				for i := range 300 {
					msg := make([]byte, 1+rng.IntN(40_000))
					for i := range msg {
						msg[i] = byte(rng.Uint32())
					}
					if i%50 == 49 {
						if err := e.update(i%100 == 99); err != nil {
							t.Fatal(err)
						}
					}
					if _, err := e.Write(msg); err != nil {
						t.Fatal(err)
					}
					got := make([]byte, len(msg))
					if _, err := io.ReadFull(e, got); err != nil || !bytes.Equal(got, msg) {
						t.Fatalf("message %d came back wrong: %v", i, err)
					}
				}
				if err := e.close(); err != nil {
					t.Fatal(err)
				}
				if n, err := e.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("after close_notify Read = %d, %v, want EOF", n, err)
				}
				work.Wait()
			})
		}
	}
}

func TestCryptoTLSUnderstandsOurAlerts(t *testing.T) {
	a, b := tcpPair(t)
	peer := tls.Server(b, config())
	var work sync.WaitGroup
	var got error
	work.Go(func() { _, got = peer.Read(make([]byte, 1)) })
	e := takeOver(t, a, record.Client, config())
	out, err := e.sealer.Alert(nil, record.BadRecordMAC)
	if err != nil {
		t.Fatal(err)
	}
	a.Write(out)
	work.Wait()
	if alert, ok := errors.AsType[tls.AlertError](got); !ok && !strings.Contains(fmt.Sprint(got), "bad record MAC") {
		t.Errorf("peer saw %v (%v), want our alert", got, alert)
	}
}

func TestARefusedCertificateIsAnAlertAfterTheHandshake(t *testing.T) {
	a, b := tcpPair(t)
	cfg := config()
	cfg.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not you") }
	peer := tls.Server(b, cfg)
	var work sync.WaitGroup
	work.Go(func() { peer.Handshake() })
	e := takeOver(t, a, record.Client, config())
	_, err := e.Read(make([]byte, 1))
	if err == nil || err.Error() != "remote error: tls: bad certificate" {
		t.Errorf("Read = %v", err)
	}
	work.Wait()
}

// programTimeout bounds a conversation with another program.
const programTimeout = 10 * time.Second

// chat is a program that we talk to by its standard input and output.
type chat struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t *testing.T, args ...string) *chat {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("optional program openssl is not installed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), programTimeout)
	cmd := exec.CommandContext(ctx, openssl, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout // where it says what it did
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); in.Close(); cmd.Wait() })
	return &chat{t, in, bufio.NewReader(out)}
}

func (c *chat) say(line string) {
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Errorf("tell openssl %q: %v", line, err)
	}
}

// hear waits for a line that contains s.
func (c *chat) hear(s string) {
	c.t.Helper()
	for {
		line, err := c.out.ReadString('\n')
		if strings.Contains(line, s) {
			return
		}
		if err != nil {
			c.t.Fatalf("openssl did not say %q: %v", s, err)
		}
	}
}

// gossip exchanges lines and key updates of both sides' making: k renews the program's key, K asks us to renew ours.
func (c *chat) gossip(e *end) {
	c.t.Helper()
	lines := bufio.NewReader(e)
	exchange := func(i int) {
		c.t.Helper()
		want := fmt.Sprintf("line %d for you", i)
		c.say(want)
		if got, err := lines.ReadString('\n'); err != nil || got != want+"\n" {
			c.t.Fatalf("line %d came as %q, %v", i, got, err)
		}
		mine := fmt.Sprintf("answer %d", i)
		io.WriteString(e, mine+"\n")
		c.hear(mine)
	}
	exchange(0)
	for i, command := range []string{"k", "K", "K", "k"} {
		c.say(command)
		if err := e.next(); err != nil || len(e.rest) > 0 { // else the program might take the command and the next line for one
			c.t.Fatalf("key update came as %q, %v", e.rest, err)
		}
		exchange(10*i + 1)
		if err := e.update(i%2 == 0); err != nil {
			c.t.Fatal(err)
		}
		exchange(10*i + 2)
	}
	if e.updates != 2 {
		c.t.Errorf("we answered %d key updates, want 2", e.updates)
	}
}

func TestOpenSSLClient(t *testing.T) {
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} {
		t.Run(suite, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			cert, key := pemFiles(t)
			c := start(t, "s_client", "-connect", ln.Addr().String(), "-tls1_3", "-ciphersuites", suite,
				"-cert", cert, "-key", key, "-servername", "localhost")
			raw, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(programTimeout))
			e := takeOver(t, raw, record.Server, config())
			if got := tls.CipherSuiteName(e.state.CipherSuite); got != suite {
				t.Fatalf("suite %s, want %s", got, suite)
			}
			c.hear("---")
			c.gossip(e)
			c.say("Q")
			if n, err := e.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("Read after Q = %d, %v, want its close_notify", n, err)
			}
		})
	}
}

func TestOpenSSLServer(t *testing.T) {
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} {
		t.Run(suite, func(t *testing.T) {
			cert, key := pemFiles(t)
			// It sends two session tickets behind the handshake.
			c := start(t, "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-ciphersuites", suite,
				"-cert", cert, "-key", key, "-Verify", "1", "-CAfile", cert, "-num_tickets", "2")
			var addr string
			for addr == "" {
				line, err := c.out.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				addr, _ = strings.CutPrefix(strings.TrimSpace(line), "ACCEPT ")
				if !strings.HasPrefix(line, "ACCEPT ") {
					addr = ""
				}
			}
			raw, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(programTimeout))
			e := takeOver(t, raw, record.Client, config())
			if got := tls.CipherSuiteName(e.state.CipherSuite); got != suite {
				t.Fatalf("suite %s, want %s", got, suite)
			}
			c.hear("CIPHER is")
			c.gossip(e)
			c.say("Q")
			if n, err := e.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("Read after Q = %d, %v, want its close_notify", n, err)
			}
		})
	}
}
