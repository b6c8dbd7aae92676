package peers

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// single is an L7 proxy of one process.
type single struct {
	name, version string
	files         map[string]string // by their names in the scratch folder
	argv          []string
	sites         map[string]uint16 // ports
	hbone         *HBONE            // of SiteHBONE
	cipher        func(context.Context) string
}

// start runs the proxy on the client's node.
func (p single) start(ctx context.Context, env *Env) (*Running, error) {
	for name, text := range p.files {
		if err := os.WriteFile(filepath.Join(env.Dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	proc, err := Spawn(ctx, Program{NetNS: env.Node.NetNS, Log: filepath.Join(env.Dir, p.name+"-l7.log"), Argv: p.argv})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	r := &Running{
		Client: env.Client, Server: env.Server, Listen: env.EchoPort, Stop: proc.Stop, PIDs: []int{proc.PID()},
		Version: p.version, Cipher: p.cipher, Sites: make(map[string]Site),
	}
	if r.Cipher == nil {
		r.Cipher = plaintext
	}
	for name, port := range p.sites {
		site := Site{Addr: netip.AddrPortFrom(env.Node.Addr, port), Path: "/items?page=1"}
		switch name {
		case SiteHBONE:
			site.HBONE = p.hbone
		case SiteRoutes:
			site.Path = lastPath
		}
		r.Sites[name] = site
	}
	return r, nil
}

func plaintext(context.Context) string { return "none" }

// The ports of L7 proxies on the client's node.
const (
	nginxHTTP1   = 7201
	nginxHTTP2   = 7202
	haproxyHTTP1 = 7211
	haproxyHTTP2 = 7212
	nghttpxHTTP2 = 7222
	stdHTTP1     = 7231
	stdHTTP2     = 7232
)

// NginxL7 is one nginx as an HTTP proxy. Its HTTP/2 goes on as gRPC, the only HTTP/2 it speaks to servers.
type NginxL7 struct{}

// Name implements Contender.
func (NginxL7) Name() string { return "nginx" }

// Start implements Contender.
func (NginxL7) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := installed(ctx, "nginx", "nginx", "-v")
	if err != nil {
		return nil, err
	}
	return single{
		name: "nginx", version: strings.TrimPrefix(version, "nginx version: "), files: map[string]string{"nginx-l7.conf": NginxHTTP(env)},
		argv:  []string{bin, "-e", "stderr", "-c", filepath.Join(env.Dir, "nginx-l7.conf")},
		sites: map[string]uint16{SiteHTTP1: nginxHTTP1, SiteHTTP2: nginxHTTP2},
	}.start(ctx, env)
}

var nginxL7Conf = template.Must(template.New("nginx l7").Parse(`daemon off;
user root;
worker_processes {{.Env.Workers}};
worker_rlimit_nofile 20000;
pid {{.Env.Dir}}/nginx-l7.pid;
error_log stderr crit;
events { worker_connections 9900; }
http {
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 10m;
  keepalive_requests 1000000000;
  http2_max_concurrent_streams 1000;
  client_body_buffer_size 128k;
  proxy_buffers 8 64k;
  proxy_busy_buffers_size 128k;
  client_body_temp_path {{.Env.Dir}}/nginx-body;
  proxy_temp_path {{.Env.Dir}}/nginx-proxy;
  fastcgi_temp_path {{.Env.Dir}}/nginx-fastcgi;
  uwsgi_temp_path {{.Env.Dir}}/nginx-uwsgi;
  scgi_temp_path {{.Env.Dir}}/nginx-scgi;
{{- range .Upstreams}}
  upstream {{.}} {
    server {{$.Env.Server.Addr}}:{{$.Env.EchoPort}};
    keepalive 1024;
    keepalive_requests 1000000000;
    keepalive_timeout 10m;
  }
{{- end}}
  server {
    listen 0.0.0.0:{{.HTTP1}} reuseport;
    location / {
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_pass http://app;
    }
  }
  server {
    listen 0.0.0.0:{{.HTTP2}} http2 reuseport;
    location / {
      grpc_set_header Host $http_host;
      grpc_pass grpc://app2;
    }
  }
}
`))

// NginxHTTP is the configuration of nginx as an HTTP proxy.
func NginxHTTP(env *Env) string {
	return render(nginxL7Conf, map[string]any{"Env": env, "HTTP1": nginxHTTP1, "HTTP2": nginxHTTP2,
		"Upstreams": []string{"app", "app2"}}) // one for each protocol: kept connections are not told apart
}

// HAProxyL7 is one HAProxy in HTTP mode.
type HAProxyL7 struct{}

// Name implements Contender.
func (HAProxyL7) Name() string { return "haproxy" }

// Start implements Contender.
func (HAProxyL7) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := installed(ctx, "haproxy", "haproxy", "-v")
	if err != nil {
		return nil, err
	}
	return single{
		name: "haproxy", version: version, files: map[string]string{"haproxy-l7.cfg": HAProxyHTTP(env)},
		argv:  []string{bin, "-db", "-f", filepath.Join(env.Dir, "haproxy-l7.cfg")},
		sites: map[string]uint16{SiteHTTP1: haproxyHTTP1, SiteHTTP2: haproxyHTTP2},
	}.start(ctx, env)
}

var haproxyL7Conf = template.Must(template.New("haproxy l7").Parse(`global
  nbthread {{.Env.Workers}}
  maxconn 9000
  tune.bufsize 65536
  tune.h2.max-concurrent-streams 1000
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 10m
  timeout server 10m
  timeout http-keep-alive 10m
frontend one
  bind 0.0.0.0:{{.HTTP1}}
  default_backend one
frontend two
  bind 0.0.0.0:{{.HTTP2}} proto h2
  default_backend two
backend one
  server app {{.Env.Server.Addr}}:{{.Env.EchoPort}}
backend two
  server app {{.Env.Server.Addr}}:{{.Env.EchoPort}} proto h2
`))

// HAProxyHTTP is the configuration of HAProxy in HTTP mode.
func HAProxyHTTP(env *Env) string {
	return render(haproxyL7Conf, map[string]any{"Env": env, "HTTP1": haproxyHTTP1, "HTTP2": haproxyHTTP2})
}

// NGHTTPX is nghttp2's own proxy, in C++: HTTP/2 on both sides.
type NGHTTPX struct{}

// Name implements Contender.
func (NGHTTPX) Name() string { return "nghttpx" }

// Start implements Contender.
func (NGHTTPX) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := installed(ctx, "nghttpx", "nghttp2-proxy", "--version")
	if err != nil {
		return nil, err
	}
	return single{
		name: "nghttpx", version: version,
		argv: []string{
			bin, "--conf=/dev/null", fmt.Sprintf("--frontend=0.0.0.0,%d;no-tls", nghttpxHTTP2),
			fmt.Sprintf("--backend=%s,%d;;proto=h2", env.Server.Addr, env.EchoPort), fmt.Sprintf("--workers=%d", env.Workers),
			"--frontend-http2-max-concurrent-streams=1000", "--backend-http2-max-concurrent-streams=1000",
			"--frontend-http2-read-timeout=600", "--accesslog-file=/dev/null", "--errorlog-file=/dev/stderr", "--log-level=ERROR",
			"--single-process",
		},
		sites: map[string]uint16{SiteHTTP2: nghttpxHTTP2},
	}.start(ctx, env)
}

// Std is the reverse proxy of Go's standard library; see package stdproxy.
type Std struct{}

// Name implements Contender.
func (Std) Name() string { return "go-proxy" }

// Start implements Contender.
func (Std) Start(ctx context.Context, env *Env) (*Running, error) {
	return single{
		name: "go-proxy", version: "httputil.ReverseProxy, " + goVersion(),
		argv: []string{
			env.Self, "stdproxy", "-to", fmt.Sprintf("%s:%d", env.Server.Addr, env.EchoPort),
			"-http1", fmt.Sprintf("0.0.0.0:%d", stdHTTP1), "-http2", fmt.Sprintf("0.0.0.0:%d", stdHTTP2),
		},
		sites: map[string]uint16{SiteHTTP1: stdHTTP1, SiteHTTP2: stdHTTP2},
	}.start(ctx, env)
}
