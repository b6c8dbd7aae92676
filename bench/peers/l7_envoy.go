package peers

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"text/template"

	"github.com/mistnet/mistnet/bench/control"
)

func goVersion() string { return runtime.Version() }

// The ports of Envoy as a waypoint.
const (
	envoyHTTP1    = 7241
	envoyHTTP2    = 7242
	envoyRoutes   = 7243
	envoyPolicies = 7244
	envoyHBONE    = 7245
)

// lastPath is what the last of a thousand rules is for.
var lastPath = control.Thousand.Path()

// EnvoyL7 is one Envoy set up as Istio sets up a waypoint: authorization, fault injection and CORS before the router, and HBONE ended
// by a listener that hands each tunnel to an internal one.
type EnvoyL7 struct{}

// Name implements Contender.
func (EnvoyL7) Name() string { return "envoy" }

// Start implements Contender.
func (EnvoyL7) Start(ctx context.Context, env *Env) (*Running, error) {
	bin, version, err := findEnvoy(ctx, env)
	if err != nil {
		return nil, err
	}
	return single{
		name: "envoy", version: version, files: map[string]string{"envoy-l7.yaml": EnvoyWaypoint(env)},
		argv: envoyArgv(env, bin, filepath.Join(env.Dir, "envoy-l7.yaml")),
		sites: map[string]uint16{
			SiteHTTP1: envoyHTTP1, SiteHTTP2: envoyHTTP2, SiteRoutes: envoyRoutes, SitePolicies: envoyPolicies, SiteHBONE: envoyHBONE,
		},
		hbone: &HBONE{
			Authority: control.One.VIP.String(), Cert: env.Certs.ClientCert, Key: env.Certs.ClientKey, Root: env.Certs.CA,
			Local: control.Identity("client").String(), Expect: control.Identity("server").String(),
		},
		cipher: func(ctx context.Context) string { return envoyCipher(ctx, envoyAdmin(env, "l7")) },
	}.start(ctx, env)
}

// envoyPolicySet is what one RBAC filter does to paths that begin so, a policy for each.
type envoyPolicySet struct {
	Action   string
	Prefixes []string
}

// envoyListener is one of those that speak HTTP.
type envoyListener struct {
	Name, Codec, Cluster string
	Port                 uint16 // 0: an internal one
	Rules                []string
	Policies             []envoyPolicySet
}

func envoyListeners() []envoyListener {
	one := []envoyPolicySet{{"ALLOW", []string{"/"}}}
	var rules, denied, allowed []string
	for i := range control.Rules {
		rules = append(rules, control.Prefix(i, control.Rules))
	}
	for i := range control.Policies / 2 {
		denied, allowed = append(denied, fmt.Sprintf("/denied-%d/", i)), append(allowed, fmt.Sprintf("/allowed-%d/", i))
	}
	allowed[len(allowed)-1] = "/"
	all := []string{"/"}
	return []envoyListener{
		{"http1", "HTTP1", "app", envoyHTTP1, all, one},
		{"http2", "HTTP2", "app2", envoyHTTP2, all, one},
		{"routes", "HTTP1", "app", envoyRoutes, rules, one},
		{"policies", "HTTP1", "app", envoyPolicies, all, []envoyPolicySet{{"DENY", denied}, {"ALLOW", allowed}}},
		{"inside", "HTTP1", "app", 0, all, one},
	}
}

var envoyL7Conf = template.Must(template.Must(envoyTunnelConf.Clone()).New("envoy l7").Parse(`admin:
  address: {pipe: {path: "{{.Admin}}"}}
stats_flush_interval: 60s
bootstrap_extensions:
- name: internal
  typed_config: {"@type": type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener}
static_resources:
  listeners:
{{template "tunnel" .}}
{{- range .Listeners}}
  - name: {{.Name}}
{{- if .Port}}
    address: {socket_address: {address: 0.0.0.0, port_value: {{.Port}}}}
{{- else}}
    internal_listener: {}
{{- end}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {{.Name}}
          codec_type: {{.Codec}}
          server_name: istio-envoy
          normalize_path: true
          merge_slashes: false
          stream_idle_timeout: 0s
          http2_protocol_options: {max_concurrent_streams: 1000, initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              include_request_attempt_count: true
              routes:
{{- $cluster := .Cluster}}
{{- range .Rules}}
              - match: {prefix: "{{.}}"}
                route: {cluster: {{$cluster}}, timeout: 0s, retry_policy: {retry_on: "connect-failure,refused-stream,unavailable,cancelled", num_retries: 2}}
                typed_per_filter_config:
                  envoy.filters.http.cors:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy
                    allow_origin_string_match: [{exact: "https://pages.test"}]
                    allow_methods: GET
                  envoy.filters.http.fault:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault
                    abort: {http_status: 503, percentage: {numerator: 0}}
{{- end}}
          http_filters:
{{- range .Policies}}
          - name: envoy.filters.http.rbac.{{.Action}}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: {{.Action}}
                policies:
{{- range $i, $prefix := .Prefixes}}
                  "p{{printf "%03d" $i}}":
                    permissions:
                    - and_rules:
                        rules:
                        - or_rules: {rules: [{header: {name: ":method", string_match: {exact: GET}}}, {header: {name: ":method", string_match: {exact: POST}}}]}
                        - url_path: {path: {prefix: "{{$prefix}}"}}
                    principals: [{any: true}]
{{- end}}
{{- end}}
          - name: envoy.filters.http.fault
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault}
          - name: envoy.filters.http.cors
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors}
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
{{- end}}
  clusters:
  - name: inside
    type: STATIC
    transport_socket:
      name: internal
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport
        transport_socket:
          name: raw
          typed_config: {"@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer}
    load_assignment:
      cluster_name: inside
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {envoy_internal_address: {server_listener_name: inside, endpoint_id: inside}}}
{{- range .Clusters}}
  - name: {{.}}
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000, max_retries: 100000}]
    load_assignment:
      cluster_name: {{.}}
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: "{{$.Env.Server.Addr}}", port_value: {{$.Env.EchoPort}}}}}
{{- if eq . "app2"}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options: {initial_stream_window_size: 1048576, initial_connection_window_size: 16777216}
{{- end}}
{{- end}}
`))

// EnvoyWaypoint is the configuration of Envoy as a waypoint.
func EnvoyWaypoint(env *Env) string {
	return render(envoyL7Conf, map[string]any{
		"Env": env, "Admin": envoyAdmin(env, "l7"), "Tunnel": envoyTunnel{"hbone", envoyHBONE, "inside"}, "Listeners": envoyListeners(), "Clusters": []string{"app", "app2"},
	})
}
