package peers

import (
	"context"
	"path/filepath"
	"text/template"
)

// The ports of the HAProxy pair.
const (
	haproxyFront = 7002
	haproxyOuter = 15201
	haproxyInner = 15202
)

// HAProxy is a pair of HAProxies in TCP mode with mutual TLS 1.3 between them, a TLS connection for each application connection.
type HAProxy struct{}

// Name implements Contender.
func (HAProxy) Name() string { return "haproxy" }

// Start implements Contender.
func (HAProxy) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := installed(ctx, "haproxy", "haproxy", "-v")
	if err != nil {
		return nil, err
	}
	inner, outer := filepath.Join(env.Dir, "haproxy-inner.cfg"), filepath.Join(env.Dir, "haproxy-outer.cfg")
	if err := writeConfigs(map[string]string{inner: HAProxyInner(env), outer: HAProxyOuter(env)}); err != nil {
		return nil, err
	}
	return pair{
		name: "haproxy", frontPort: haproxyFront, outerPort: haproxyOuter,
		inner:   []string{bin, "-db", "-f", inner},
		outer:   []string{bin, "-db", "-f", outer},
		version: version,
		cipher:  onlySuite,
	}.start(ctx, env)
}

var haproxyConf = template.Must(template.New("haproxy").Parse(`global
  nbthread {{.Env.Workers}}
  maxconn 9000
  tune.bufsize 65536
defaults
  mode tcp
  timeout connect 5s
  timeout client 10m
  timeout server 10m
listen bench
{{- if eq .Side "inner"}}
  bind 0.0.0.0:{{.InnerPort}} ssl crt {{.Env.Certs.ServerBoth}} ca-file {{.Env.Certs.CA}} verify required ssl-min-ver TLSv1.3 ciphersuites {{.Suite}}
  server app {{.Env.Server.Addr}}:{{.Env.EchoPort}}
{{- else}}
  bind 0.0.0.0:{{.OuterPort}}
  server inner {{.Env.Server.Addr}}:{{.InnerPort}} ssl crt {{.Env.Certs.ClientBoth}} ca-file {{.Env.Certs.CA}} verify required verifyhost {{.ServerName}} sni str({{.ServerName}}) ssl-min-ver TLSv1.3 ciphersuites {{.Suite}}
{{- end}}
`))

// HAProxyInner is the configuration of the proxy in the server's pod.
func HAProxyInner(env *Env) string { return haproxyText(env, "inner") }

// HAProxyOuter is the configuration of the proxy in the client's pod.
func HAProxyOuter(env *Env) string { return haproxyText(env, "outer") }

func haproxyText(env *Env, side string) string {
	return render(haproxyConf, map[string]any{
		"Env": env, "Side": side, "Suite": suite, "ServerName": serverName, "InnerPort": haproxyInner, "OuterPort": haproxyOuter,
	})
}
