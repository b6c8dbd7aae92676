package echo_test

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/mistnet/mistnet/e2e/echo"
)

// free returns ports nobody listens on.
func free(t *testing.T, n int) []string {
	t.Helper()
	var ports []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		ports = append(ports, port)
	}
	return ports
}

// serve runs the servers with the suite's own arguments, on other ports, until the test ends.
func serve(t *testing.T) (web, secure, grpc string) {
	t.Helper()
	p := free(t, 4)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- echo.Main(ctx, "server", []string{
			"--tcp=" + p[0], "--port=" + p[1], "--grpc=" + p[2], "--port=" + p[3], "--tls=" + p[3], "--crt=/cert.crt", "--key=/cert.key",
		}, os.Stderr)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for _, port := range p {
		for {
			c, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err == nil {
				c.Close()
				break
			}
			select {
			case err := <-done:
				t.Fatal(err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return "127.0.0.1:" + p[1], "127.0.0.1:" + p[3], "127.0.0.1:" + p[2]
}

// client returns what the client prints, taken apart at empty lines as the suite does.
func client(t *testing.T, args ...string) []string {
	t.Helper()
	var out bytes.Buffer
	if err := echo.Main(t.Context(), "client", args, &out); err != nil {
		t.Fatalf("client %q: %v", args, err)
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n\n"), "\n\n")
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	web, secure, grpc := serve(t)
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args  []string
		count int
		want  []string // one of each in every answer, as whole lines after the bracket
	}{
		{[]string{"http://" + web + "/a?b=c", "--method=POST", "-H", "X-One:1", "-H", "Host:other.example"}, 1, []string{
			"StatusCode=200", "Host=other.example", "Method=POST", "URL=/a?b=c", "RequestHeader=X-One:1", "ResponseHeader=Content-Type:text/plain",
		}},
		{[]string{"https://" + secure, "--count=2"}, 2, []string{"StatusCode=200", "Host=" + secure, "Method=GET", "URL=/"}},
		{[]string{"grpc://" + grpc, "--count=3", "-H", "x-one:1"}, 3, []string{"StatusCode=200", "Host=" + grpc, "RequestHeader=x-one:1", "Proto=GRPC"}},
	} {
		answers := client(t, c.args...)
		if len(answers) != c.count {
			t.Errorf("client %q printed %d answers, want %d", c.args, len(answers), c.count)
		}
		for _, a := range answers {
			for _, want := range append(c.want, "Hostname="+name) {
				if n := len(regexp.MustCompile(`(?m)^\[\d+( body)?\] `+regexp.QuoteMeta(want)+`$`).FindAllString(a, -1)); n != 1 {
					t.Errorf("client %q: %q is there %d times in\n%s", c.args, want, n, a)
				}
			}
		}
	}
}

func TestClientFollowsNoRedirects(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.RedirectHandler("http://elsewhere.example/", http.StatusFound)}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Close() })
	a := client(t, "http://"+ln.Addr().String())[0]
	for _, want := range []string{"StatusCode=302", "ResponseHeader=Location:http://elsewhere.example/"} {
		if !strings.Contains(a, want) {
			t.Errorf("answer is\n%s\nwant %s in it", a, want)
		}
	}
}
