package peers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

// nginxModule is where Debian's libnginx-mod-stream puts the stream module.
const nginxModule = "/usr/lib/nginx/modules/ngx_stream_module.so"

// The ports of the nginx pair.
const (
	nginxFront = 7001
	nginxOuter = 15101
	nginxInner = 15102
)

// Nginx is a pair of nginx stream proxies with mutual TLS 1.3 between them, a TLS connection for each application connection.
type Nginx struct{}

// Name implements Contender.
func (Nginx) Name() string { return "nginx" }

// Start implements Contender.
func (Nginx) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := installed(ctx, "nginx", "nginx libnginx-mod-stream", "-v")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(nginxModule); err != nil {
		return nil, fmt.Errorf("%s: %w (apt-get install libnginx-mod-stream)", nginxModule, ErrAbsent)
	}
	inner, outer := filepath.Join(env.Dir, "nginx-inner.conf"), filepath.Join(env.Dir, "nginx-outer.conf")
	if err := writeConfigs(map[string]string{inner: NginxInner(env), outer: NginxOuter(env)}); err != nil {
		return nil, err
	}
	return pair{
		name: "nginx", frontPort: nginxFront, outerPort: nginxOuter,
		inner:   []string{bin, "-e", "stderr", "-c", inner},
		outer:   []string{bin, "-e", "stderr", "-c", outer},
		version: strings.TrimPrefix(version, "nginx version: "),
		cipher:  onlySuite,
	}.start(ctx, env)
}

// onlySuite is the cipher of a peer that was left no other choice.
func onlySuite(context.Context) string { return suite + " (the only one allowed)" }

var nginxConf = template.Must(template.New("nginx").Parse(`daemon off;
user root;
worker_processes {{.Env.Workers}};
pid {{.Env.Dir}}/nginx-{{.Side}}.pid;
error_log stderr crit;
load_module {{.Module}};
events { worker_connections 4096; }
stream {
  access_log off;
  tcp_nodelay on;
  proxy_buffer_size 64k;
  proxy_timeout 10m;
  server {
{{- if eq .Side "inner"}}
    listen 0.0.0.0:{{.InnerPort}} ssl reuseport;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites {{.Suite}};
    ssl_certificate {{.Env.Certs.ServerCert}};
    ssl_certificate_key {{.Env.Certs.ServerKey}};
    ssl_client_certificate {{.Env.Certs.CA}};
    ssl_verify_client on;
    ssl_session_cache shared:bench:8m;
    proxy_pass {{.Env.Server.Addr}}:{{.Env.EchoPort}};
{{- else}}
    listen 0.0.0.0:{{.OuterPort}} reuseport;
    proxy_pass {{.Env.Server.Addr}}:{{.InnerPort}};
    proxy_ssl on;
    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_conf_command Ciphersuites {{.Suite}};
    proxy_ssl_certificate {{.Env.Certs.ClientCert}};
    proxy_ssl_certificate_key {{.Env.Certs.ClientKey}};
    proxy_ssl_trusted_certificate {{.Env.Certs.CA}};
    proxy_ssl_verify on;
    proxy_ssl_name {{.ServerName}};
    proxy_ssl_server_name on;
    proxy_ssl_session_reuse on;
{{- end}}
  }
}
`))

// NginxInner is the configuration of the proxy in the server's pod.
func NginxInner(env *Env) string { return nginxText(env, "inner") }

// NginxOuter is the configuration of the proxy in the client's pod.
func NginxOuter(env *Env) string { return nginxText(env, "outer") }

func nginxText(env *Env, side string) string {
	return render(nginxConf, map[string]any{
		"Env": env, "Side": side, "Module": nginxModule, "Suite": suite, "ServerName": serverName,
		"InnerPort": nginxInner, "OuterPort": nginxOuter,
	})
}

// render fills a template of ours; that it can be filled is known when the tests pass.
func render(t *template.Template, with any) string {
	var b strings.Builder
	if err := t.Execute(&b, with); err != nil {
		panic(fmt.Sprintf("render configuration: %v", err))
	}
	return b.String()
}
