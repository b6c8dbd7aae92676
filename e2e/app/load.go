package app

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// loads are the commands that count: something to call, and how often in a second.
var loads = map[string]func(ctx context.Context, target string, rate int, out io.Writer) error{
	"load": func(ctx context.Context, url string, rate int, out io.Writer) error {
		return requests(ctx, newClient(patience), url, rate, out)
	},
	"keep": func(ctx context.Context, url string, rate int, out io.Writer) error {
		return requests(ctx, &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: rate}}, url, rate, out)
	},
	"calls":   calls,
	"sockets": sockets,
}

func requests(ctx context.Context, client *http.Client, url string, rate int, out io.Writer) error {
	return load(ctx, rate, out, func(ctx context.Context) error {
		status, _, err := request(ctx, client, http.MethodGet, url, "")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
}

// calls asks for the server's health. A connection that ends is made anew by the library, and calls wait for it.
func calls(ctx context.Context, addr string, rate int, out io.Writer) error {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := grpc_health_v1.NewHealthClient(conn)
	return load(ctx, rate, out, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
		return err
	})
}

// load does something at a rate, each time on its own, so that what is slow does not hold up the next. Failures are printed as
// they happen, totals every second and at the end. Nothing is cut off by the end of the program.
func load(ctx context.Context, rate int, out io.Writer, do func(context.Context) error) error {
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	var all sync.WaitGroup
	var sent, failed atomic.Int64
	for n := 1; ctx.Err() == nil; n++ {
		all.Go(func() {
			err := do(context.WithoutCancel(ctx))
			sent.Add(1)
			if err != nil {
				failed.Add(1)
				fmt.Fprintln(out, time.Now().Format(time.StampMilli), err)
			}
		})
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		if n%rate == 0 {
			fmt.Fprintf(out, "sent %d failed %d\n", sent.Load(), failed.Load())
		}
	}
	all.Wait()
	fmt.Fprintf(out, "sent %d failed %d\n", sent.Load(), failed.Load())
	return nil
}

// sockets echoes messages over one WebSocket. Proxies that are replaced end what lives longer than they wait for: that is
// printed, and is no failure. That the next one cannot be opened is.
func sockets(ctx context.Context, target string, rate int, out io.Writer) error {
	u, err := url.Parse(target)
	if err != nil {
		return err
	}
	cfg, err := websocket.NewConfig("ws://"+u.Host+u.Path, target)
	if err != nil {
		return err
	}
	var sent, failed int
	for cut := 1; ctx.Err() == nil; cut++ {
		opened := time.Now()
		bound, cancel := context.WithTimeout(ctx, patience)
		c, err := cfg.DialContext(bound)
		cancel()
		if err != nil {
			failed++
			fmt.Fprintln(out, time.Now().Format(time.StampMilli), "open:", err)
			fmt.Fprintf(out, "sent %d failed %d\n", sent, failed)
			continue
		}
		err = echoes(ctx, c, rate, func() {
			if sent++; sent%rate == 0 {
				fmt.Fprintf(out, "sent %d failed %d\n", sent, failed)
			}
		})
		_ = c.Close()
		if ctx.Err() == nil {
			fmt.Fprintln(out, time.Now().Format(time.StampMilli), "cut", cut, "after", time.Since(opened).Round(time.Millisecond), err)
		}
	}
	fmt.Fprintf(out, "sent %d failed %d\n", sent, failed)
	return nil
}

// echoes sends messages until one does not come back.
func echoes(ctx context.Context, c *websocket.Conn, rate int, came func()) error {
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	for ctx.Err() == nil {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if err := websocket.Message.Send(c, "tick"); err != nil {
			return err
		}
		var got string
		if err := websocket.Message.Receive(c, &got); err != nil {
			return err
		}
		if got != "tick" {
			return fmt.Errorf("got %q", got)
		}
		came()
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return nil
}
