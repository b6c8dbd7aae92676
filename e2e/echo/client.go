package echo

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// client makes requests one after the other, and fails at the first that gets no answer at all.
func client(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("usage: client URL [--method M] [-H NAME:VALUE]... [--count N]")
	}
	target, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	flags := flag.NewFlagSet("client", flag.ContinueOnError)
	method := flags.String("method", http.MethodGet, "of HTTP requests")
	count := flags.Int("count", 1, "how many requests")
	headers := http.Header{}
	flags.Func("H", "a header, `NAME:VALUE`", func(v string) error {
		name, value, ok := strings.Cut(v, ":")
		if !ok {
			return fmt.Errorf("header %q: want NAME:VALUE", v)
		}
		headers.Add(name, strings.TrimSpace(value))
		return nil
	})
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected %q", flags.Args())
	}
	ask := overHTTP(target, *method, headers)
	if target.Scheme == "grpc" {
		over, closeConn, err := overGRPC(target, headers)
		if err != nil {
			return err
		}
		defer closeConn()
		ask = over
	}
	for i := range *count {
		a, err := once(ctx, ask)
		if err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		a.number = i
		if err := a.print(out); err != nil {
			return err
		}
	}
	return nil
}

type asker func(ctx context.Context) (answered, error)

func once(ctx context.Context, ask asker) (answered, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return ask(ctx)
}

// overHTTP asks over one connection, as long as the server keeps it.
func overHTTP(target *url.URL, method string, headers http.Header) asker {
	c := &http.Client{
		Transport: &http.Transport{
			DisableCompression: true,
			TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, // servers sign for themselves
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) (answered, error) {
		req, err := http.NewRequestWithContext(ctx, method, target.String(), nil)
		if err != nil {
			return answered{}, err
		}
		req.Header = headers.Clone()
		if host := headers.Get("Host"); host != "" {
			req.Host = host
			req.Header.Del("Host")
		}
		resp, err := c.Do(req)
		if err != nil {
			return answered{}, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return answered{code: resp.StatusCode, headers: resp.Header, body: string(body)}, err
	}
}

// overGRPC asks over one connection. What a server refuses is an error: the suite knows of no code but 200.
func overGRPC(target *url.URL, headers http.Header) (asker, func() error, error) {
	conn, err := grpc.NewClient("dns:///"+target.Host, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	md := metadata.MD{}
	for name, values := range headers {
		md.Append(name, values...)
	}
	return func(ctx context.Context) (answered, error) {
		var header metadata.MD
		reply := new(wrapperspb.StringValue)
		ctx = metadata.NewOutgoingContext(ctx, md)
		err := conn.Invoke(ctx, echoMethod, wrapperspb.String(target.Path), reply, grpc.Header(&header))
		return answered{code: http.StatusOK, headers: header, body: reply.GetValue()}, err
	}, conn.Close, nil
}
