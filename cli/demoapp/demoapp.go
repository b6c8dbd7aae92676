// Package demoapp is the application of the demo's pods: a server that says whom it sees and echoes lines, one that speaks
// HTTP, and clients that call them. It knows nothing of the mesh; that is its purpose.
package demoapp

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// Main runs one of the program's commands:
//
//	serve NAME ADDR       listen; greet each caller with "NAME sees CALLER", then echo lines
//	call ADDR TEXT        connect, send one line, print the greeting and the echo
//	hold ADDR INTERVAL    connect and echo a line every INTERVAL, printing "tick N", until the connection ends
//	web NAME ADDR         serve HTTP: answer NAME; /flaky fails every other time with 503, /slow takes 3 s, /healthz fails
//	                      after /sick until /well
//	get URL N PARALLEL [HEADER]
//	                      with headers NAME: VALUE, any number of them, send N requests, PARALLEL at a time, and count the answers
func Main(ctx context.Context, args []string, out io.Writer) error {
	switch {
	case len(args) == 3 && args[0] == "serve":
		return serve(ctx, args[1], args[2], out)
	case len(args) == 3 && args[0] == "call":
		return call(ctx, args[1], args[2], out)
	case len(args) == 3 && args[0] == "hold":
		every, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		return hold(ctx, args[1], every, out)
	case len(args) == 3 && args[0] == "web":
		return web(ctx, args[1], args[2], out)
	case len(args) >= 4 && args[0] == "get":
		return get(ctx, args[1], args[2], args[3], args[4:], out)
	}
	return errors.New("usage: demo-app serve NAME ADDR | call ADDR TEXT | hold ADDR INTERVAL | web NAME ADDR | " +
		"get URL N PARALLEL [HEADER]")
}

func serve(ctx context.Context, name, addr string, out io.Writer) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	unlink := context.AfterFunc(ctx, func() { ln.Close() })
	defer unlink()
	fmt.Fprintln(out, "listening on", ln.Addr())
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		conns.Go(func() { greet(ctx, name, c) })
	}
}

func greet(ctx context.Context, name string, c net.Conn) {
	defer c.Close()
	unlink := context.AfterFunc(ctx, func() { c.Close() })
	defer unlink()
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	if _, err := fmt.Fprintf(c, "%s sees %s\n", name, strings.TrimPrefix(host, "::ffff:")); err != nil {
		return
	}
	_, _ = io.Copy(c, c)
}

// dialTimeout bounds a connection attempt.
const dialTimeout = 3 * time.Second

func connect(ctx context.Context, addr string) (net.Conn, *bufio.Reader, string, error) {
	c, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, "", err
	}
	_ = c.SetReadDeadline(time.Now().Add(dialTimeout))
	r := bufio.NewReader(c)
	greeting, err := r.ReadString('\n')
	if err != nil {
		c.Close()
		return nil, nil, "", fmt.Errorf("connected, but no greeting came: %w", err)
	}
	return c, r, strings.TrimSpace(greeting), nil
}

func call(ctx context.Context, addr, text string, out io.Writer) error {
	c, r, greeting, err := connect(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	echo, err := exchange(c, r, text)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%s\n%s\n", greeting, echo)
	return err
}

func hold(ctx context.Context, addr string, every time.Duration, out io.Writer) error {
	c, r, greeting, err := connect(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	unlink := context.AfterFunc(ctx, func() { c.Close() })
	defer unlink()
	fmt.Fprintln(out, greeting)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 1; ; n++ {
		if _, err := exchange(c, r, fmt.Sprintf("tick %d", n)); err != nil {
			fmt.Fprintln(out, "closed:", err)
			return nil
		}
		fmt.Fprintln(out, "tick", n)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func exchange(c net.Conn, r *bufio.Reader, line string) (string, error) {
	_ = c.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	echo, err := r.ReadString('\n')
	return strings.TrimSpace(echo), err
}
