// Package gateway says what a Gateway of the Gateway API becomes when it is a waypoint: the Kubernetes objects that run
// it, and the status that tells how that goes. It calls nobody; package kube applies what it says.
//
// Names, labels and annotations are Istio's, so that its tools find what is here, overlays that people wrote for it fit,
// and either control plane can take over from the other without a restart of what it finds: what differs is replaced.
package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// The classes of waypoints, and the controllers that they name. Both stand for the same waypoint.
const (
	Class           = "mistnet-waypoint"
	Controller      = "mistnet.io/mesh-controller"
	IstioClass      = "istio-waypoint"
	IstioController = "istio.io/mesh-controller"
)

// Labels and annotations of Gateways and of what runs them.
const (
	LabelName    = "gateway.networking.k8s.io/gateway-name"       // on all objects; pods of a waypoint are found by it
	LabelClass   = "gateway.networking.k8s.io/gateway-class-name" // on all objects
	LabelManaged = "gateway.istio.io/managed"                     // on all objects; what lacks it is never touched
	Managed      = "istio.io-mesh-controller"                     // its value

	// ClassDescription is spec.description of the GatewayClasses that istiod makes, by which they are told from other people's.
	ClassDescription = "Waypoints, run by Mistnet"

	AnnotationName    = "gateway.istio.io/name-override"   // of Deployment and Service
	AnnotationAccount = "gateway.istio.io/service-account" // of the ServiceAccount
	AnnotationType    = "networking.istio.io/service-type" // of the Service: ClusterIP if not given

	// AnnotationClientCert, of a Gateway, has its waypoint name clients to applications.
	AnnotationClientCert = "ambient.istio.io/xfcc-include-client-identity" // "true"
	annotationDist       = "networking.istio.io/traffic-distribution"
	annotationVersion    = "gateway.istio.io/controller-version"
	annotationApplied    = "kubectl.kubernetes.io/last-applied-configuration"
	labelNetwork         = "topology.istio.io/network"

	// ProtocolHBONE is the protocol of a waypoint's listener. It is Istio's addition to the Gateway API.
	ProtocolHBONE gatewayv1.ProtocolType = "HBONE"
)

// Config is what a control plane knows of its waypoints.
type Config struct {
	Image    string              // of the waypoint's container; "": none can be deployed
	Defaults map[string]Overlays // what is merged into every waypoint's objects, by class; those of "" first

	// IgnoreIstio leaves Gateways of Istio's class to Istio.
	IgnoreIstio bool

	Namespace     string // istiod's own
	Revision      string // of the control plane; "" or default: its Service is istiod
	ClusterID     string
	ClusterDomain string
	TrustDomain   string
	Network       string // of this cluster's pods
	LogLevel      string // "": info
	LogFormat     string // "": plain

	Settings Settings
}

// Controls reports whether a GatewayClass with this spec.controllerName is this control plane's.
func (c Config) Controls(controller string) bool {
	return controller == Controller || controller == IstioController && !c.IgnoreIstio
}

// Classes are the GatewayClasses that should exist: names and controllers.
func (c Config) Classes() map[string]string {
	all := map[string]string{Class: Controller}
	if !c.IgnoreIstio {
		all[IstioClass] = IstioController
	}
	return all
}

// Manual reports whether somebody else runs the Gateway: spec.addresses then names an existing Service.
func Manual(gw *gatewayv1.Gateway) bool {
	return len(gw.Spec.Addresses) > 1 ||
		len(gw.Spec.Addresses) == 1 && addressType(gw.Spec.Addresses[0]) != gatewayv1.IPAddressType
}

// addressType: without one an address is an IP address, says the API.
func addressType(a gatewayv1.GatewaySpecAddress) gatewayv1.AddressType {
	if a.Type == nil {
		return gatewayv1.IPAddressType
	}
	return *a.Type
}

// Names of what runs a Gateway.
type Names struct {
	Service        string // and of the Deployment and what goes with it
	ServiceAccount string
	Label          string // the value of LabelName
}

// NamesOf are the Gateway's name wherever it can be the name of a Service and the value of a label, and its beginning with
// a hash elsewhere.
func NamesOf(gw *gatewayv1.Gateway) Names {
	n := Names{Service: fit(gw.Name, true), Label: fit(gw.Name, false)}
	if name := gw.Annotations[AnnotationName]; name != "" {
		n.Service = name
	}
	n.ServiceAccount = fit(gw.Name, true)
	if name := gw.Annotations[AnnotationAccount]; name != "" {
		n.ServiceAccount = name
	}
	return n
}

// maxLabel is the length of a DNS label (RFC 1123), and of a label's value.
const maxLabel = 63

// fit makes a label of an object's name, which may have 253 characters and dots.
func fit(name string, dns bool) string {
	if len(name) <= maxLabel && !(dns && strings.Contains(name, ".")) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	hash := "-" + hex.EncodeToString(sum[:4])
	if dns {
		name = strings.ReplaceAll(name, ".", "-")
	}
	return strings.TrimRight(name[:min(len(name), maxLabel-len(hash))], "-.") + hash
}

// Hostname is the name by which the mesh knows the waypoint.
func (c Config) Hostname(gw *gatewayv1.Gateway) string {
	return NamesOf(gw).Service + "." + gw.Namespace + ".svc." + c.ClusterDomain
}

// ServiceNamed finds the Service that a manual Gateway's address names: by its short name or its name in DNS.
func (c Config) ServiceNamed(gw *gatewayv1.Gateway, a gatewayv1.GatewaySpecAddress) (namespace, name string, err error) {
	if addressType(a) != gatewayv1.HostnameAddressType {
		return "", "", fmt.Errorf("address %q is an %s: only the Hostname of a Service can be given", a.Value, addressType(a))
	}
	if !strings.Contains(a.Value, ".") {
		return gw.Namespace, a.Value, nil
	}
	host, ok := strings.CutSuffix(strings.TrimSuffix(a.Value, "."), ".svc."+c.ClusterDomain)
	name, namespace, dotted := strings.Cut(host, ".")
	if !ok || !dotted || strings.Contains(namespace, ".") {
		return "", "", fmt.Errorf("address %q is not the name of a Service: want SERVICE or SERVICE.NAMESPACE.svc.%s", a.Value, c.ClusterDomain)
	}
	return namespace, name, nil
}

// Serves reports whether a listener is one that a waypoint has: HBONE on port 15008.
func Serves(l gatewayv1.Listener) bool {
	return l.Protocol == ProtocolHBONE && l.Port == portHBONE
}

// metadata are the labels or annotations that people want on what runs a Gateway: those of spec.infrastructure, else the
// Gateway's own, as Istio does. The Gateway API's own are not copied.
func metadata[K, V ~string](infrastructure map[K]V, own map[string]string) map[string]string {
	all := make(map[string]string)
	if infrastructure != nil {
		for k, v := range infrastructure {
			all[string(k)] = string(v)
		}
	} else {
		maps.Copy(all, own)
	}
	maps.DeleteFunc(all, func(k, _ string) bool {
		return strings.HasPrefix(k, "gateway.networking.k8s.io/") ||
			slices.Contains([]string{annotationApplied, annotationVersion, AnnotationName, AnnotationAccount}, k)
	})
	return all
}
