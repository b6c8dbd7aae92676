package translate

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Labels and annotations that say what a pod is.
const (
	labelTunnel             = "networking.istio.io/tunnel"
	labelCanonicalName      = "service.istio.io/canonical-name"
	labelCanonicalRevision  = "service.istio.io/canonical-revision"
	labelSubzone            = "topology.istio.io/subzone"
	labelOldRegion          = "failure-domain.beta.kubernetes.io/region"
	labelOldZone            = "failure-domain.beta.kubernetes.io/zone"
	labelPodTemplateHash    = "pod-template-hash"
	redirectionEnabled      = "enabled"
	defaultCanonicalVersion = "latest"
)

// PodInput is what the workload of a pod depends on.
type PodInput struct {
	Pod      *corev1.Pod
	Node     *corev1.Node      // the one it runs on; nil when not known
	Services []*corev1.Service // those that select it, in any order
	Slices   []Backing         // services without a selector that name it in an EndpointSlice, in any order
	Entries  []*ServiceEntry   // those that select it, in any order
	Policies []string          // keys of the policies attached to it, in any order

	Waypoint  mesh.GatewayAddress // that traffic addressed to it goes through first
	AppTunnel mesh.AppTunnel      // what it wants connections wrapped in
	Targeting []string            // keys of the policies that target the waypoint it is an instance of, in any order
}

// Pod returns the workload of a pod, or nil when the pod cannot be reached: it has no address yet, or has ended.
func Pod(cfg Config, in PodInput) (*mesh.Workload, *Status) {
	pod := in.Pod
	if pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
		return nil, nil
	}
	addrs, err := podAddrs(pod)
	if err != nil {
		return nil, &Status{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, Reason: Invalid, Message: err.Error()}
	}
	if len(addrs) == 0 {
		return nil, nil
	}
	w := &mesh.Workload{
		UID:            PodUID(cfg, Name{pod.Namespace, pod.Name}),
		Name:           pod.Name,
		Namespace:      pod.Namespace,
		Addrs:          addrs,
		TrustDomain:    cfg.TrustDomain,
		ServiceAccount: ServiceAccount(pod),
		Node:           pod.Spec.NodeName,
		ClusterID:      cfg.ClusterID,
		Locality:       locality(in.Node),
		HostNetwork:    pod.Spec.HostNetwork,
		Healthy:        isReady(pod) && pod.DeletionTimestamp == nil,
		Capacity:       1,
		Kind:           mesh.KindPod, // what Istio sends for pods, whatever owns them
		OwnerName:      ownerName(pod),
		Labels:         filled(pod.Labels),
		Policies:       sortedSet(in.Policies),
		Services:       podServices(cfg, in),
		Waypoint:       in.Waypoint,
		AppTunnel:      in.AppTunnel,
		TargetPolicies: sortedSet(in.Targeting),
	}
	w.Protocol, w.NativeTunnel = tunnel(pod.Labels, pod.Annotations)
	canonical(w, pod.Labels)
	return w, nil
}

// canonical names what the workload is a version of, by its labels or else by its owner.
func canonical(w *mesh.Workload, labels map[string]string) {
	w.CanonicalName = cmp.Or(labels[labelCanonicalName], labels["app.kubernetes.io/name"], labels["app"], w.OwnerName)
	w.CanonicalRevision = cmp.Or(labels[labelCanonicalRevision], labels["app.kubernetes.io/version"], labels["version"], defaultCanonicalVersion)
}

// filled makes nil of no labels, so that equal workloads are equal. Every label is kept, those that controllers add too:
// a subset may be one revision of a Deployment by its pod-template-hash.
func filled(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	return labels
}

// PodUID is the UID of the workload of the Pod of that name.
func PodUID(cfg Config, n Name) string { return cfg.ClusterID + "//Pod/" + n.Namespace + "/" + n.Name }

// TrimPod returns a pod with only what Pod looks at: a cluster has many, and most of each is of no interest here.
func TrimPod(pod *corev1.Pod) *corev1.Pod {
	t := &corev1.Pod{}
	t.Name, t.Namespace = pod.Name, pod.Namespace
	t.Labels, t.OwnerReferences, t.DeletionTimestamp = pod.Labels, pod.OwnerReferences, pod.DeletionTimestamp
	if v, ok := pod.Annotations[mesh.AnnotationRedirection]; ok {
		t.Annotations = map[string]string{mesh.AnnotationRedirection: v}
	}
	t.Spec.NodeName, t.Spec.HostNetwork = pod.Spec.NodeName, pod.Spec.HostNetwork
	t.Spec.ServiceAccountName = ServiceAccount(pod)
	t.Spec.Containers = trimContainers(pod.Spec.Containers)
	t.Spec.InitContainers = trimContainers(pod.Spec.InitContainers)
	t.Status.Phase, t.Status.PodIP, t.Status.PodIPs = pod.Status.Phase, pod.Status.PodIP, pod.Status.PodIPs
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			t.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
			break
		}
	}
	return t
}

// trimContainers keeps the named ports of containers that have any.
func trimContainers(containers []corev1.Container) []corev1.Container {
	var kept []corev1.Container
	for _, c := range containers {
		if len(c.Ports) > 0 {
			kept = append(kept, corev1.Container{Ports: c.Ports, RestartPolicy: c.RestartPolicy})
		}
	}
	return kept
}

// ServiceAccount is the account a pod runs as.
func ServiceAccount(pod *corev1.Pod) string {
	return cmp.Or(pod.Spec.ServiceAccountName, pod.Spec.DeprecatedServiceAccount, mesh.DefaultServiceAccount)
}

func podAddrs(pod *corev1.Pod) ([]netip.Addr, error) {
	ips := pod.Status.PodIPs
	if len(ips) == 0 && pod.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: pod.Status.PodIP}}
	}
	addrs := make([]netip.Addr, 0, len(ips))
	for i, ip := range ips {
		a, err := netip.ParseAddr(ip.IP)
		if err != nil || a.Zone() != "" || a.IsUnspecified() {
			return nil, fmt.Errorf("status.podIPs[%d]: %q is not an address", i, ip.IP)
		}
		if a = a.Unmap(); !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}

func isReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// tunnel says how a workload is reached: by HBONE when it is redirected, which the CNI agent says of pods, or when it says
// that it speaks HBONE itself.
func tunnel(labels, annotations map[string]string) (p mesh.TunnelProtocol, native bool) {
	for proto := range strings.SplitSeq(labels[labelTunnel], ",") {
		if strings.EqualFold(strings.TrimSpace(proto), "http") {
			native = true
		}
	}
	if native || annotations[mesh.AnnotationRedirection] == redirectionEnabled {
		return mesh.ProtocolHBONE, native
	}
	return mesh.ProtocolTCP, false
}

func locality(node *corev1.Node) mesh.Locality {
	if node == nil {
		return mesh.Locality{}
	}
	return mesh.Locality{
		Region:  cmp.Or(node.Labels[corev1.LabelTopologyRegion], node.Labels[labelOldRegion]),
		Zone:    cmp.Or(node.Labels[corev1.LabelTopologyZone], node.Labels[labelOldZone]),
		Subzone: node.Labels[labelSubzone],
	}
}

// cronJobRun is the end of the name of a Job that a CronJob started: its time in minutes, or older in seconds.
var cronJobRun = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// ownerName is the name of what a person deployed: a Deployment rather than its ReplicaSet, a CronJob rather than its
// Job. Both are known only by how they name what they own.
func ownerName(pod *corev1.Pod) string {
	owner := metav1.GetControllerOfNoCopy(pod)
	if owner == nil {
		return pod.Name
	}
	switch owner.Kind {
	case "ReplicaSet":
		if hash := pod.Labels[labelPodTemplateHash]; hash != "" {
			if name, found := strings.CutSuffix(owner.Name, "-"+hash); found && name != "" {
				return name
			}
		}
	case "Job":
		if m := cronJobRun.FindStringSubmatch(owner.Name); m != nil {
			return m[1]
		}
	}
	return owner.Name
}

// podServices is the pod's place in each of its services, sorted by key.
func podServices(cfg Config, in PodInput) []mesh.ServicePorts {
	var places []mesh.ServicePorts
	for _, svc := range in.Services {
		if svc.Spec.Type == corev1.ServiceTypeExternalName {
			continue
		}
		places = append(places, mesh.ServicePorts{Service: serviceKey(cfg, svc), Ports: podPorts(svc, in.Pod)})
	}
	backing := slices.SortedFunc(slices.Values(in.Slices), func(a, b Backing) int { return cmp.Compare(a.Slice.Name, b.Slice.Name) })
	for _, b := range backing {
		key := serviceKey(cfg, b.Service)
		if !slices.ContainsFunc(places, func(p mesh.ServicePorts) bool { return p.Service == key }) {
			places = append(places, mesh.ServicePorts{Service: key, Ports: slicePorts(b.Service, b.Slice)})
		}
	}
	return entryPlaces(places, in.Entries, func(p *networkingapi.ServicePort) uint16 { return containerPort(in.Pod, p.GetName()) })
}

// podPorts maps the service's ports to the pod's. A port whose target the pod does not name is left out.
func podPorts(svc *corev1.Service, pod *corev1.Pod) []mesh.Port {
	var ports []mesh.Port
	for _, p := range tcpPorts(svc) {
		target := targetNumber(p)
		if p.TargetPort.Type == intstr.String {
			target = containerPort(pod, p.TargetPort.StrVal)
		}
		if target != 0 {
			ports = append(ports, mesh.Port{ServicePort: uint16(p.Port), TargetPort: target})
		}
	}
	return ports
}

// containerPort finds a named TCP port, in long-running init containers too.
func containerPort(pod *corev1.Pod, name string) uint16 {
	find := func(c *corev1.Container) uint16 {
		for _, p := range c.Ports {
			if p.Name == name && (p.Protocol == "" || p.Protocol == corev1.ProtocolTCP) {
				return portNumber(p.ContainerPort)
			}
		}
		return 0
	}
	for i := range pod.Spec.Containers {
		if n := find(&pod.Spec.Containers[i]); n != 0 {
			return n
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
			continue
		}
		if n := find(c); n != 0 {
			return n
		}
	}
	return 0
}

// sortedSet returns the strings in order, each once, in a new list.
func sortedSet(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}
