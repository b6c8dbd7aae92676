// Package app is what runs in the pods of suites: servers that say whom they see, and clients that count. It knows nothing
// of the mesh and links little, for every pod of a suite carries it.
//
//	app serve [HTTP ECHO [GRPC]]  HTTP on :8080, TCP and UDP echo on :9000, gRPC health on :9090, or elsewhere, until it is told
//	                              to end, and DRAIN longer if the environment says so; a POST to /exit ends it with an error
//	app get URL [COUNT]           one line per request: STATUS DURATION BODY; fails at the first that fails
//	app post URL BODY             one request
//	app load URL RATE             requests per second, each on a new connection; "sent N failed N" in all, every second
//	app keep URL RATE             the same on connections that are kept, as most clients do
//	app calls HOST:PORT RATE      the same with gRPC calls on one connection
//	app sockets URL RATE          messages per second over one WebSocket; one that ends is opened anew, and failed is how often
//	                              that failed; "cut N after DURATION"
//	app udp HOST:PORT TEXT        one datagram and its answer
//	app hold HOST:PORT INTERVAL   one TCP connection over which a line is echoed every interval, "tick N"
//	app resolve NAME              addresses, one per line
//	app wait DURATION             does nothing
package app

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Where serve listens.
const (
	HTTPAddr = ":8080"
	EchoAddr = ":9000"
	GRPCAddr = ":9090"
)

// requestTimeout bounds one request of a client. The tests run on machines that are busy with other things: what is slow has
// not failed.
const requestTimeout = 15 * time.Second

// patience bounds a request of those who count failures for as long as they run.
const patience = 30 * time.Second

// Main runs one of the commands. It ends when ctx does.
func Main(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		args = []string{"serve"}
	}
	command, args := args[0], args[1:]
	switch {
	case command == "serve" && len(args) == 0:
		return serve(ctx, addresses{HTTPAddr, EchoAddr, GRPCAddr}, out)
	case command == "serve" && len(args) == 2:
		return serve(ctx, addresses{web: args[0], echo: args[1]}, out)
	case command == "serve" && len(args) == 3:
		return serve(ctx, addresses{args[0], args[1], args[2]}, out)
	case command == "get" && len(args) == 1:
		return get(ctx, args[0], 1, out)
	case command == "get" && len(args) == 2:
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return get(ctx, args[0], n, out)
	case command == "post" && len(args) == 2:
		return post(ctx, args[0], args[1], out)
	case loads[command] != nil && len(args) == 2:
		rate, err := strconv.Atoi(args[1])
		if err != nil || rate < 1 {
			return fmt.Errorf("rate %q: want requests per second", args[1])
		}
		return loads[command](ctx, args[0], rate, out)
	case command == "hold" && len(args) == 2:
		every, err := time.ParseDuration(args[1])
		if err != nil {
			return err
		}
		return hold(ctx, args[0], every, out)
	case command == "udp" && len(args) == 2:
		return datagram(ctx, args[0], args[1], out)
	case command == "resolve" && len(args) == 1:
		ips, err := net.DefaultResolver.LookupHost(ctx, args[0])
		if err != nil {
			return err
		}
		fmt.Fprintln(out, strings.Join(ips, "\n"))
		return nil
	case command == "wait" && len(args) == 1:
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
		return nil
	}
	return errors.New("usage: app serve [HTTP ECHO [GRPC]] | get URL [COUNT] | post URL BODY | load URL RATE | keep URL RATE | calls HOST:PORT RATE | sockets URL RATE | udp HOST:PORT TEXT | hold HOST:PORT INTERVAL | resolve NAME | wait DURATION")
}

func datagram(ctx context.Context, addr, text string, out io.Writer) error {
	c, err := (&net.Dialer{Timeout: requestTimeout}).DialContext(ctx, "udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	_, err = out.Write(buf[:n])
	return err
}

// newClient makes a client that connects anew for every request.
func newClient(timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}}
}

func get(ctx context.Context, url string, count int, out io.Writer) error {
	client := newClient(requestTimeout)
	for range count {
		began := time.Now()
		status, body, err := request(ctx, client, http.MethodGet, url, "")
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%d %s %s\n", status, time.Since(began).Round(10*time.Microsecond), strings.TrimSpace(body))
	}
	return nil
}

func post(ctx context.Context, url, body string, out io.Writer) error {
	status, answer, err := request(ctx, newClient(requestTimeout), http.MethodPost, url, body)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d %s\n", status, strings.TrimSpace(answer))
	return nil
}

func request(ctx context.Context, client *http.Client, method, url, body string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(answer), err
}

func hold(ctx context.Context, addr string, every time.Duration, out io.Writer) error {
	c, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	greeting, err := r.ReadString('\n')
	if err != nil {
		return fmt.Errorf("connected, but no greeting came: %w", err)
	}
	fmt.Fprint(out, greeting)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 1; ; n++ {
		_ = c.SetDeadline(time.Now().Add(patience))
		line := fmt.Sprintf("tick %d\n", n)
		if _, err := io.WriteString(c, line); err != nil {
			return err
		}
		got, err := r.ReadString('\n')
		if err != nil || got != line {
			return fmt.Errorf("tick %d: got %q: %w", n, got, err)
		}
		fmt.Fprint(out, line)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
