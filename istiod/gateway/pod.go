package gateway

import (
	"cmp"
	"fmt"
	"maps"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Variables of the waypoint's flags (waypoint.Config.Register) that fitGrace looks at.
const (
	envDrainDelay = "DRAIN_DELAY"
	envDeadline   = "CONNECTION_TERMINATION_DEADLINE"
)

func (c Config) deployment(gw *gatewayv1.Gateway) *appsv1.Deployment {
	n := NamesOf(gw)
	own := map[string]string{LabelName: n.Label}
	d := &appsv1.Deployment{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"}, ObjectMeta: c.meta(gw, n.Service)}
	d.Spec = appsv1.DeploymentSpec{
		Selector: &metav1.LabelSelector{MatchLabels: own},
		Template: corev1.PodTemplateSpec{ObjectMeta: c.podMeta(gw), Spec: c.pod(gw)},
	}
	return d
}

func (c Config) podMeta(gw *gatewayv1.Gateway) metav1.ObjectMeta {
	n := NamesOf(gw)
	meta := c.meta(gw, "")
	labels := map[string]string{
		"sidecar.istio.io/inject":             "false",
		"service.istio.io/canonical-name":     n.Service,
		"service.istio.io/canonical-revision": "latest",
	}
	maps.Copy(labels, meta.Labels)
	// It terminates HBONE itself: a node proxy in its way would take the same port.
	labels[mesh.LabelDataplaneMode] = mesh.DataplaneModeNone
	maps.Copy(meta.Annotations, map[string]string{
		"istio.io/rev":         cmp.Or(c.Revision, "default"),
		"prometheus.io/path":   "/stats/prometheus",
		"prometheus.io/port":   strconv.Itoa(mesh.PortMetrics),
		"prometheus.io/scrape": "true",
	})
	return metav1.ObjectMeta{Labels: labels, Annotations: meta.Annotations}
}

func (c Config) pod(gw *gatewayv1.Gateway) corev1.PodSpec {
	n := NamesOf(gw)
	seconds, no := int64(grace.Seconds()), false
	return corev1.PodSpec{
		ServiceAccountName: n.ServiceAccount,
		NodeSelector:       map[string]string{corev1.LabelOSStable: "linux"},
		// It never calls the API server.
		AutomountServiceAccountToken:  &no,
		TerminationGracePeriodSeconds: &seconds,
		SecurityContext:               &corev1.PodSecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
		TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: corev1.LabelHostname,
			WhenUnsatisfiable: corev1.ScheduleAnyway, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{LabelName: n.Label}}}},
		Containers: []corev1.Container{c.container(gw)},
		Volumes: []corev1.Volume{
			{Name: "istiod-ca-cert", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
				LocalObjectReference: corev1.LocalObjectReference{Name: "istio-ca-root-cert"}}}},
			{Name: "istio-token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
				Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
					Audience: "istio-ca", ExpirationSeconds: new(int64(12 * 60 * 60)), Path: "istio-token"}}}}}},
		},
	}
}

func (c Config) container(gw *gatewayv1.Gateway) corev1.Container {
	yes, no, id := true, false, int64(proxyID)
	return corev1.Container{
		Name:  container,
		Image: c.Image,
		Ports: []corev1.ContainerPort{
			{Name: "metrics", ContainerPort: mesh.PortMetrics, Protocol: corev1.ProtocolTCP},
			{Name: "status-port", ContainerPort: mesh.PortReadiness, Protocol: corev1.ProtocolTCP},
			{Name: "mesh", ContainerPort: portHBONE, Protocol: corev1.ProtocolTCP},
		},
		Env: c.env(gw),
		// There is no startup probe: a waypoint that waits for istiod is not mended by being started again.
		ReadinessProbe: &corev1.Probe{PeriodSeconds: 2, TimeoutSeconds: 5, FailureThreshold: 3, ProbeHandler: corev1.ProbeHandler{
			HTTPGet: &corev1.HTTPGetAction{Path: "/healthz/ready", Port: intstr.FromInt32(mesh.PortReadiness)}}},
		SecurityContext: &corev1.SecurityContext{
			Privileged: &no, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, RunAsNonRoot: &yes, RunAsUser: &id, RunAsGroup: &id,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "istiod-ca-cert", MountPath: "/var/run/secrets/istio", ReadOnly: true},
			{Name: "istio-token", MountPath: "/var/run/secrets/tokens", ReadOnly: true},
		},
	}
}

// env are the variables of waypoint's flags.
func (c Config) env(gw *gatewayv1.Gateway) []corev1.EnvVar {
	istiod := "istiod"
	if c.Revision != "" && c.Revision != "default" {
		istiod += "-" + c.Revision
	}
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
	}
	labels, _ := c.metadata(gw)
	env := []corev1.EnvVar{
		{Name: "GATEWAY_NAME", Value: gw.Name},
		{Name: "SERVICE_NAME", Value: NamesOf(gw).Service},
		field("POD_NAME", "metadata.name"),
		field("POD_NAMESPACE", "metadata.namespace"),
		field("INSTANCE_IP", "status.podIP"),
		field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
		{Name: "CLUSTER_ID", Value: c.ClusterID},
		{Name: "CLUSTER_DOMAIN", Value: c.ClusterDomain},
		{Name: "TRUST_DOMAIN", Value: c.TrustDomain},
		{Name: "XDS_ADDRESS", Value: fmt.Sprintf("https://%s.%s.svc:%d", istiod, c.Namespace, mesh.PortXDS)},
		{Name: "XDS_ROOT_CA", Value: "/var/run/secrets/istio/root-cert.pem"},
		{Name: "AUTH_TOKEN", Value: "/var/run/secrets/tokens/istio-token"},
		{Name: "LOG_LEVEL", Value: cmp.Or(c.LogLevel, "info")},
		{Name: "LOG_FORMAT", Value: cmp.Or(c.LogFormat, "plain")},
		// Without a limit this is what the node has.
		{Name: "GOMEMLIMIT", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.memory"}}},
	}
	if network := labels[labelNetwork]; network != "" {
		env = append(env, corev1.EnvVar{Name: "NETWORK", Value: network})
	}
	if gw.Annotations[AnnotationClientCert] == "true" {
		env = append(env, corev1.EnvVar{Name: "XFCC_INCLUDE_CLIENT_IDENTITY", Value: "true"})
	}
	return append(env, c.Settings.env()...)
}
