// Package echo is the workload of the Gateway API's conformance suite for meshes: a server that says what it was asked, and
// the client that the suite runs inside pods. The suite's own manifests name an image of another project's; what its parser
// (sigs.k8s.io/gateway-api/conformance/utils/echo) needs of that program is all that this one does.
//
//	echo [--port N]... [--tls N]... [--grpc N]... [--tcp N]...   servers; a port that --tls names too is HTTPS
//	client URL [--method M] [-H NAME:VALUE]... [--count N]       requests over http, https or grpc, redirects not followed
//
// It judges nothing: the suite compares what the client prints.
package echo

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"
)

// requestTimeout bounds one request. The suite repeats those that fail.
const requestTimeout = 10 * time.Second

// Main runs what the program is called by: client, or else the servers, until ctx is done.
func Main(ctx context.Context, name string, args []string, out io.Writer) error {
	if name == "client" {
		return client(ctx, args, out)
	}
	var s servers
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	for _, p := range []struct {
		name string
		to   *[]string
	}{{"port", &s.http}, {"tls", &s.tls}, {"grpc", &s.grpc}, {"tcp", &s.tcp}} {
		flags.Func(p.name, "a `port`", func(v string) error { *p.to = append(*p.to, v); return nil })
	}
	for _, file := range []string{"crt", "key"} {
		flags.String(file, "", "ignored: certificates are made anew, and nobody verifies them")
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if len(s.http)+len(s.grpc)+len(s.tcp) == 0 {
		s.http = []string{"8080"} // upstream's manifests have one with no arguments at all
	}
	return s.run(ctx)
}

// asked is what a server saw of a request.
type asked struct {
	host, method, path, protocol string
	headers                      map[string][]string
	hostname                     string // the server's own: the pod's name
	peer                         string
}

// text is the answer, in the fields the suite looks for.
func (a asked) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Host=%s\nMethod=%s\nURL=%s\nProto=%s\n", a.host, a.method, a.path, a.protocol)
	for name, values := range a.headers {
		for _, v := range values {
			fmt.Fprintf(&b, "RequestHeader=%s:%s\n", name, v)
		}
	}
	fmt.Fprintf(&b, "IP=%s\nHostname=%s\n", a.peer, a.hostname)
	return b.String()
}

// answered is one answer as the client prints it: the suite takes them apart at empty lines.
type answered struct {
	number  int
	code    int
	headers map[string][]string
	body    string
}

func (a answered) print(out io.Writer) error {
	b := bufio.NewWriter(out)
	fmt.Fprintf(b, "[%d] StatusCode=%d\n", a.number, a.code)
	for name, values := range a.headers {
		for _, v := range values {
			fmt.Fprintf(b, "[%d] ResponseHeader=%s:%s\n", a.number, name, v)
		}
	}
	for line := range strings.Lines(a.body) {
		if line = strings.TrimSpace(line); line != "" {
			fmt.Fprintf(b, "[%d body] %s\n", a.number, line)
		}
	}
	b.WriteByte('\n')
	return b.Flush()
}
