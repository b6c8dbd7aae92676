package waypoint_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/relay"
)

// bridge is an address where programs that know of no tunnels reach a service through the waypoint, as a ztunnel lets them.
func (l *lab) bridge(authority string) string {
	l.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ln := listen(l.t, loopback()+":0")
	var served sync.WaitGroup
	served.Go(func() {
		_ = daemon.Serve(ctx, ln, 0, func(ctx context.Context, c net.Conn) {
			s, err := l.open(ctx, authority)
			if err != nil {
				c.Close()
				return
			}
			_ = relay.Pump(ctx, c.(*net.TCPConn), s, new(relay.Counters))
		})
	})
	l.t.Cleanup(func() { cancel(); served.Wait() })
	return ln.Addr().String()
}

// TestCurl: of HTTP/1.1 and HTTP/2 with prior knowledge, bodies of all kinds both ways.
func TestCurl(t *testing.T) {
	t.Parallel()
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("CI must have curl: tools/deps.sh test")
		}
		t.Skip("curl is not installed: tools/deps.sh test")
	}
	l := newLab(t, nil)
	l.service("plain", "10.9.0.1", mesh.AppHTTP1, app2(t, true, version))
	l.service("two", "10.9.0.2", mesh.AppHTTP2, app2(t, true, version))
	l.service("unknown", "10.9.0.3", mesh.AppUnknown, app2(t, true, version))
	l.known("plain", "two", "unknown")
	body := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(body, bytes.Repeat([]byte("0123456789abcdef"), 1<<14), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, to := range []struct{ vip, one, two string }{ // how the application is asked, by what curl speaks
		{"10.9.0.1", "HTTP/1.1", "HTTP/1.1"}, {"10.9.0.2", "HTTP/2.0", "HTTP/2.0"}, {"10.9.0.3", "HTTP/1.1", "HTTP/2.0"},
	} {
		at := "http://" + l.bridge(to.vip+":80")
		for _, c := range []struct {
			args []string
			want string // of status, version and body
		}{
			{[]string{at + "/a?b=c"}, "200 %v PROTO GET HOST/a?b=c "},
			{[]string{"-X", "DELETE", at}, "200 %v PROTO DELETE HOST/ "},
			{[]string{"-d", "x=1", at + "/form"}, "200 %v PROTO POST HOST/form x=1"},
			{[]string{"--data-binary", "@" + body, at + "/large"}, "200 %v PROTO POST HOST/large SENT"}, // HTTP/1.1: Expect: 100-continue
			{[]string{"-T", body, "-H", "Transfer-Encoding: chunked", at + "/put"}, "200 %v PROTO PUT HOST/put SENT"},
			{[]string{"-H", "Host: shop.example", at}, "200 %v PROTO GET shop.example/ "},
			{[]string{at + "/1", at + "/2"}, "200 %v PROTO GET HOST/1 200 %v PROTO GET HOST/2 "},
		} {
			for flag, speaks := range map[string]struct{ v, proto string }{
				"--http1.1": {"1.1", to.one}, "--http2-prior-knowledge": {"2", to.two},
			} {
				args := append([]string{"-sS", "--max-time", "20", flag, "-w", " %{http_code} %{http_version}\n"}, c.args...)
				if all := strings.Join(args, " "); speaks.v == "2" && (strings.Contains(all, "chunked") || strings.HasSuffix(all, "/2")) {
					continue // HTTP/2 has no chunks, and Debian 12's curl fails at a second request of any server without TLS
				}
				out, err := exec.CommandContext(t.Context(), curl, args...).CombinedOutput()
				if err != nil {
					t.Errorf("curl %v: %v: %s", args, err, out)
					continue
				}
				got := ""
				for line := range strings.Lines(string(out)) { // curl tells status and version behind the body
					f := regexp.MustCompile(`^(?s)(.*) (\d+) ([\d.]+)\n$`).FindStringSubmatch(line)
					if f == nil {
						t.Fatalf("curl %v: %q", args, line)
					}
					got += f[2] + " " + f[3] + " " + f[1]
				}
				sent, _ := os.ReadFile(body)
				want := strings.NewReplacer("%v", speaks.v, "PROTO", speaks.proto, "HOST", strings.TrimPrefix(at, "http://"), "SENT", string(sent)).Replace(c.want)
				if got != want {
					t.Errorf("curl %v is answered\n%.300q, want\n%.300q", args, got, want)
				}
			}
		}
	}
}

// h2spec builds the conformance tests of HTTP/2.
var h2spec = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "h2spec-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "h2spec")
	cmd := exec.Command("go", "-C", "../tools", "build", "-o", bin, "./h2spec")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", &exec.Error{Name: string(out), Err: err}
	}
	return bin, nil
})

// TestH2spec: all of summerwind/h2spec, the strict tests too, against the waypoint's HTTP/2, in front of an application of HTTP/2
// and of one of HTTP/1.1.
func TestH2spec(t *testing.T) {
	t.Parallel()
	bin, err := h2spec()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(bin)) })
	l := newLab(t, nil)
	for name, app := range map[string]mesh.AppProtocol{"two": mesh.AppHTTP2, "one": mesh.AppHTTP1} {
		vip := map[string]string{"two": "10.9.0.1", "one": "10.9.0.2"}[name]
		l.service(name, vip, app, app2(t, true, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(w, "hello")
		}))
		l.known(name)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, bin, l.bridge(vip+":80")).CombinedOutput()
		m := regexp.MustCompile(`\d+ tests, (\d+) passed, 0 skipped, (\d+) failed`).FindStringSubmatch(string(out))
		if m == nil || m[1] == "0" {
			t.Errorf("%s: %v\n%s", name, err, out)
			continue
		}
		_, failures, _ := strings.Cut(string(out), "Failures:")
		var failed []string
		for _, f := range regexp.MustCompile(`× *\d+: (.*)`).FindAllStringSubmatch(failures, -1) {
			failed = append(failed, f[1])
		}
		// What is not HTTP/2 is taken for HTTP/1.1, which has the port as well: answered 400, and closed.
		if diff := cmp.Diff([]string{"Sends invalid connection preface"}, failed); diff != "" {
			t.Errorf("%s: failed tests (-want +got):\n%s%s", name, diff, failures)
		}
		t.Logf("%s: %s", name, m[0])
	}
}
