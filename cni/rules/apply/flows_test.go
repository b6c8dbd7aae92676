package apply_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/linux"
)

// pair makes two namespaces with a cable between them: a pod's and its peer's.
func pair(t *testing.T) (pod, peer *linux.NetNS) {
	t.Helper()
	pod, a := sandbox(t)
	b := a + "-peer"
	run(t, "ip", "netns", "add", b)
	t.Cleanup(func() { run(t, "ip", "netns", "del", b) })
	run(t, "ip", "link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
	for name, addrs := range map[string][]string{a: {"10.77.0.1/24", "fd77::1/64"}, b: {"10.77.0.2/24", "fd77::2/64"}} {
		for _, addr := range addrs {
			args := []string{"ip", "-n", name, "addr", "add", addr, "dev", "eth0"}
			if strings.Contains(addr, ":") {
				args = append(args, "nodad")
			}
			run(t, args...)
		}
		run(t, "ip", "-n", name, "link", "set", "eth0", "up")
	}
	peer, err := linux.OpenNetNS("/run/netns/" + b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return pod, peer
}

// echo answers what it hears until the test ends.
func echo(t *testing.T, in *linux.NetNS, addr string) {
	t.Helper()
	ln, err := in.Listen(t.Context(), linux.ListenOptions{Addr: netip.MustParseAddrPort(addr)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
}

// flow is a connection that says something from time to time.
type flow struct {
	name string
	c    net.Conn
}

func open(t *testing.T, name string, from *linux.NetNS, to string) flow {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	c, err := from.Dial(ctx, linux.DialOptions{Remote: netip.MustParseAddrPort(to), Timeout: 5 * time.Second})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	t.Cleanup(func() { c.Close() })
	return flow{name, c}
}

func (f flow) goesOn(t *testing.T, when string) {
	t.Helper()
	_ = f.c.SetDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 4)
	_, err := f.c.Write([]byte("ping"))
	if err == nil {
		_, err = io.ReadFull(f.c, b)
	}
	if err != nil {
		t.Errorf("%s, %s: %v", f.name, when, err)
	}
}

// Before the first rule a pod's namespace does not track connections: the kernel takes up those it has in the middle, and
// takes them for new. Nobody listens on the ports of redirection here, so one that is captured is reset.
func TestConnectionsOlderThanTheRulesGoOn(t *testing.T) {
	for mode, r := range redirectors(t) {
		t.Run(mode, func(t *testing.T) {
			pod, peer := pair(t)
			const port = ":9000"
			var flows []flow
			for _, host := range []string{"10.77.0.", "[fd77::"} {
				at := func(n string) string {
					if host[0] == '[' {
						return host + n + "]" + port
					}
					return host + n + port
				}
				echo(t, pod, at("1"))
				echo(t, peer, at("2"))
				for _, kind := range []string{"busy", "idle"} {
					flows = append(flows, open(t, kind+" from the pod to "+at("2"), pod, at("2")),
						open(t, kind+" to the pod at "+at("1"), peer, at("1")))
				}
			}
			all := func(when string, kind string) {
				for _, f := range flows {
					if strings.HasPrefix(f.name, kind) {
						f.goesOn(t, when)
					}
				}
			}
			all("before", "")
			rs := rules.InPod(rules.Options{Joined: true})
			if _, err := r.Apply(pod, rs); err != nil {
				t.Fatal(err)
			}
			all("with the rules", "busy")
			all("with the rules, again", "busy")
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if c, err := pod.Dial(ctx, linux.DialOptions{Remote: netip.MustParseAddrPort("10.77.0.2:9000"), Timeout: time.Second}); err == nil {
				c.Close()
				t.Error("a new connection was not captured: the test is blind")
			}
			if err := r.Remove(pod, rs); err != nil {
				t.Fatal(err)
			}
			all("without the rules", "busy")
			if _, err := r.Apply(pod, rs); err != nil {
				t.Fatal(err)
			}
			all("with the rules, after a rest", "idle")
		})
	}
}

// A captured connection of which the kernel loses track is captured again, and goes on. In a pod that joined while it ran
// it is let by, as if it were older than the rules, and ends: its first segment reaches a peer that knows nothing of it.
func TestAForgottenConnectionDoesNotEscape(t *testing.T) {
	for mode, r := range redirectors(t) {
		for _, joined := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s joined=%t", mode, joined), func(t *testing.T) {
				pod, peer := pair(t)
				echo(t, pod, "0.0.0.0:15001") // in the place of ztunnel
				if _, err := r.Apply(pod, rules.InPod(rules.Options{Joined: joined})); err != nil {
					t.Fatal(err)
				}
				f := open(t, "captured", pod, "10.77.0.2:9000")
				f.goesOn(t, "captured")
				before := segmentsIn(t, peer)
				if err := pod.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
					t.Fatal(err)
				}
				_ = f.c.SetDeadline(time.Now().Add(5 * time.Second))
				_, _ = f.c.Write([]byte("secret"))
				_, err := f.c.Read(make([]byte, 8))
				if goesOn := err == nil; goesOn == joined || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the connection goes on: %t (%v), want %t", goesOn, err, !joined)
				}
				if escaped := segmentsIn(t, peer) > before; escaped != joined {
					t.Errorf("a segment reached the peer: %t, want %t", escaped, joined)
				}
			})
		}
	}
}

// segmentsIn is how many TCP segments the kernel of a namespace has received.
func segmentsIn(t *testing.T, in *linux.NetNS) (n int) {
	t.Helper()
	err := in.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) { // a line of names, then one of numbers
			if f := strings.Fields(line); f[0] == "Tcp:" {
				n, err = strconv.Atoi(f[10])
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// redirectors are the ways to put rules in.
func redirectors(t *testing.T) map[string]apply.Redirector {
	t.Helper()
	out := make(map[string]apply.Redirector)
	for _, tool := range tools(t) {
		ipt, err := apply.NewIPTables(tool)
		if err != nil {
			t.Fatal(err)
		}
		out[tool] = ipt
	}
	nft, err := apply.NewNFTables("")
	if err != nil {
		t.Fatal(err)
	}
	out["nftables"] = nft
	copies := redirection(t, apply.Config{Mode: apply.ModeIPTables})
	if err := copies.Learn(rules.InPod(rules.Options{}), rules.InPod(rules.Options{Joined: true})); err != nil {
		t.Fatal(err)
	}
	out["iptables, copied"] = copies
	return out
}
