package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/netlab"
)

// apiURL is where service shop/api is reached, apiVIP its address.
const (
	apiVIP = "10.96.0.20"
	apiURL = "http://" + apiVIP
)

// The manifest that the part of the demo under way is about goes by this name: two of them never hold at a time.
const ruleFile = "rule.yaml"

// startWaypoint runs the waypoint's program in its pod, which is named as its Gateway and account, with more flags, and waits
// until it is ready.
func (w *world) startWaypoint(ctx context.Context, p *netlab.Pod, node string, more ...string) error {
	name := p.Spec.Name
	token := w.path("tokens", name)
	if err := w.istiodTool(ctx, "token", "-service-account=shop/"+name, "-pod="+name, "-node="+node, "-out="+token); err != nil {
		return err
	}
	args := append([]string{"-gateway=" + name, "-namespace=shop", "-pod-name=" + p.Spec.Name,
		"-instance-ip=" + p.IPs[0].String(), "-xds-root-ca=" + w.path("tokens", "root-cert.pem"), "-auth-token=" + token,
		"-xds-address=https://" + netip.AddrPortFrom(w.lab.ControlPlane.IPs[0], mesh.PortXDS).String(), "-drain-delay=0s"}, more...)
	_, err := w.start(name, p.Namespace, "waypoint", args...)
	if err != nil {
		return err
	}
	return w.ready(ctx, name, p.Namespace, mesh.PortReadiness, "/healthz/ready")
}

// rule makes one manifest the only one about service api.
func (w *world) rule(c *checks, name string) {
	if err := w.writeAs(ruleFile, name, nil); err != nil {
		c.check("apply "+name, func() (string, error) { return "", err })
	}
}

// tally is the answers to requests: how many of each, by status and first line of the body, and how long the slowest took.
type tally struct {
	count   map[string]int
	slowest time.Duration
}

// ask sends n requests to service api as web, parallel of them at a time.
func (w *world) ask(ctx context.Context, path string, n, parallel int, headers ...string) (tally, error) {
	return w.request(ctx, "shop/web", apiURL+path, n, parallel, headers...)
}

// request sends n requests for a URL from a pod, parallel of them at a time.
func (w *world) request(ctx context.Context, from, url string, n, parallel int, headers ...string) (tally, error) {
	args := append([]string{"get", url, strconv.Itoa(n), strconv.Itoa(parallel)}, headers...)
	out, err := w.lab.Command(ctx, w.pods[from].Namespace, filepath.Join(w.bin, "demo-app"), args...).Output()
	if err != nil {
		return tally{}, fmt.Errorf("%s → %s: %w", from, url, err)
	}
	t := tally{count: make(map[string]int)}
	for line := range strings.Lines(string(out)) {
		n, answer, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n == "slowest" {
			t.slowest, err = time.ParseDuration(answer)
		} else {
			t.count[answer], err = strconv.Atoi(n)
		}
		if err != nil {
			return t, fmt.Errorf("%q: %w", line, err)
		}
	}
	return t, nil
}

// answered asks until the first of some requests is answered as it should be: a rule takes a moment to arrive.
func (w *world) answered(ctx context.Context, path, answer string, headers ...string) error {
	_, err := eventually(ctx, 5*time.Second, func() error {
		t, err := w.ask(ctx, path, 1, 1, headers...)
		if err == nil && t.count[answer] != 1 {
			err = fmt.Errorf("got %v, want %q", t.count, answer)
		}
		return err
	})
	return err
}

// between checks that an answer came as often as it should.
func (t tally) between(answer string, low, high int) error {
	if n := t.count[answer]; n < low || n > high {
		return fmt.Errorf("%q came %d times, want %d to %d; all: %v", answer, n, low, high, t.count)
	}
	return nil
}

const (
	v1, v2 = "200 api-v1", "200 api-v2"
)

func requests(ctx context.Context, w *world, c *checks) {
	c.check("requests to api go through its waypoint", func() (string, error) {
		t, err := w.ask(ctx, "/hello", 20, 2)
		if err == nil && t.count[v1]+t.count[v2] != 20 {
			err = fmt.Errorf("answers: %v", t.count)
		}
		if err != nil {
			return "", err
		}
		_, err = eventually(ctx, 3*time.Second, func() error {
			return w.procs["waypoint"].logContains(`"GET /hello HTTP/1.1" 200`, "inbound-vip|80|http|api.shop.svc.cluster.local")
		})
		return "20 requests in the waypoint's access log", err
	})

	w.rule(c, "canary.yaml")
	c.check("canary 90/10, and testers always see the new version", func() (string, error) {
		if err := w.answered(ctx, "/", v2, "x-user: tester"); err != nil {
			return "", err
		}
		t, err := w.ask(ctx, "/", 1000, 4)
		if err == nil {
			err = t.between(v2, 50, 160)
		}
		if err != nil {
			return "", err
		}
		testers, err := w.ask(ctx, "/", 50, 2, "x-user: tester")
		if err == nil {
			err = testers.between(v2, 50, 50)
		}
		return fmt.Sprintf("of 1000 requests v1 %d, v2 %d; of 50 testers' v2 %d", t.count[v1], t.count[v2], testers.count[v2]), err
	})
	w.withdraw(c, ruleFile)

	c.check("the service fails every other time …", func() (string, error) {
		t, err := w.ask(ctx, "/flaky", 100, 1)
		failed := t.count["503 api-v1"] + t.count["503 api-v2"]
		if err == nil && failed < 30 {
			err = fmt.Errorf("%d of 100 failed: %v", failed, t.count)
		}
		return fmt.Sprintf("%d of 100 failed", failed), err
	})
	w.rule(c, "retry.yaml")
	c.check("… and no client notices, since the waypoint tries again", func() (string, error) {
		var t tally
		_, err := eventually(ctx, 5*time.Second, func() (err error) {
			if t, err = w.ask(ctx, "/flaky", 100, 1); err == nil && t.count[v1]+t.count[v2] != 100 {
				err = fmt.Errorf("answers: %v", t.count)
			}
			return err
		})
		return "0 of 100 failed", err
	})

	w.rule(c, "timeout.yaml")
	c.check("a timeout of 1 s: a slow answer is not waited for (HTTPRoute)", func() (string, error) {
		var t tally
		_, err := eventually(ctx, 10*time.Second, func() (err error) {
			if t, err = w.ask(ctx, "/slow", 1, 1); err == nil && t.count["504 upstream request timeout"] != 1 {
				err = fmt.Errorf("answers: %v", t.count)
			}
			return err
		})
		if err == nil && (t.slowest < time.Second || t.slowest > 2*time.Second) {
			err = fmt.Errorf("it took %s", t.slowest)
		}
		return fmt.Sprintf("504 after %s", t.slowest), err
	})

	w.rule(c, "abort.yaml")
	c.check("fault injection: one request in ten is failed on purpose", func() (string, error) {
		const aborted = "418 fault filter abort"
		var t tally
		_, err := eventually(ctx, 5*time.Second, func() (err error) {
			if t, err = w.ask(ctx, "/", 1000, 4); err == nil {
				err = t.between(aborted, 50, 160)
			}
			return err
		})
		return fmt.Sprintf("%d of 1000", t.count[aborted]), err
	})

	w.rule(c, "breaker.yaml")
	c.check("a circuit breaker: two slow requests at a time, the others are refused at once", func() (string, error) {
		const overflow = "503 upstream connect error or disconnect/reset before headers. reset reason: overflow"
		var t tally
		_, err := eventually(ctx, 15*time.Second, func() (err error) {
			if t, err = w.ask(ctx, "/slow", 10, 10); err == nil {
				err = t.between(overflow, 8, 8)
			}
			return err
		})
		return fmt.Sprintf("of 10 at a time %d answered, %d refused", t.count[v1]+t.count[v2], t.count[overflow]), err
	})

	w.rule(c, "health.yaml")
	c.check("a health check: who says that he is not well gets no requests, until he is", func() (string, error) {
		for _, step := range []struct {
			page      string
			low, high int // of 40 requests, those that api-v1 answers
		}{{"/healthz", 1, 39}, {"/sick", 0, 0}, {"/well", 1, 39}} {
			if _, err := w.request(ctx, "shop/api-v1", "http://127.0.0.1:8080"+step.page, 1, 1); err != nil {
				return "", err
			}
			if _, err := eventually(ctx, 15*time.Second, func() error {
				t, err := w.ask(ctx, "/", 40, 2)
				if err == nil && t.count[v1]+t.count[v2] != 40 {
					err = fmt.Errorf("answers: %v", t.count)
				}
				if err == nil {
					err = t.between(v1, step.low, step.high)
				}
				return err
			}); err != nil {
				return "", fmt.Errorf("after %s: %w", step.page, err)
			}
		}
		return "api-v1 out, and in again", nil
	})

	w.rule(c, "admin.yaml")
	c.check("an AuthorizationPolicy denies a path, and nothing else", func() (string, error) {
		if err := w.answered(ctx, "/admin/users", "403 RBAC: access denied"); err != nil {
			return "", err
		}
		t, err := w.ask(ctx, "/administrator", 20, 2)
		if err == nil && t.count[v1]+t.count[v2] != 20 {
			err = fmt.Errorf("answers: %v", t.count)
		}
		return "403 on /admin/users, 200 on /administrator", err
	})
	w.withdraw(c, ruleFile)

	c.check("api's node sees the waypoint's identity, not its caller's", func() (string, error) {
		const id = "spiffe://cluster.local/ns/shop/sa/waypoint"
		_, err := eventually(ctx, 3*time.Second, func() error {
			b, err := w.get(ctx, w.node("node1").Namespace, fmt.Sprintf("127.0.0.1:%d", mesh.PortMetrics), "/metrics")
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				if containsAll(line, []string{"istio_tcp_connections_opened_total{", `reporter="destination"`, `source_principal="` + id + `"`, `destination_workload="api-v1"`}) {
					return nil
				}
			}
			return errors.New("no connection of the waypoint's to api-v1 is in the metrics of ztunnel on node1")
		})
		return id, err
	})
}
