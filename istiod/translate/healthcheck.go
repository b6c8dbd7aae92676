package translate

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/internal/mesh"
)

// AnnotationHealthCheck on a DestinationRule says how waypoints ask the endpoints of its host whether they are well, in YAML or
// JSON. Istio has nothing of the kind.
const AnnotationHealthCheck = "mistnet.io/health-check"

// healthCheckText is what the annotation says.
type healthCheckText struct {
	Protocol           string  `json:"protocol"`
	Path               string  `json:"path"`
	Host               string  `json:"host"`
	Service            string  `json:"service"`
	Port               *int64  `json:"port"`
	Interval           *string `json:"interval"`
	Timeout            *string `json:"timeout"`
	UnhealthyThreshold *int64  `json:"unhealthyThreshold"`
	HealthyThreshold   *int64  `json:"healthyThreshold"`
}

// What holds where the annotation does not say it.
const (
	defaultCheckInterval  = 10 * time.Second
	defaultCheckTimeout   = time.Second
	defaultCheckUnhealthy = 3
	defaultCheckHealthy   = 1
)

var healthProtocols = map[string]mesh.HealthProtocol{"": mesh.HealthHTTP, "HTTP": mesh.HealthHTTP, "TCP": mesh.HealthTCP, "GRPC": mesh.HealthGRPC}

// healthCheck reads the annotation of a rule; nil: it has none. The error names every field at fault.
func healthCheck(dr *DestinationRule) (*mesh.HealthCheck, error) {
	text, ok := dr.Annotations[AnnotationHealthCheck]
	if !ok {
		return nil, nil
	}
	var t healthCheckText
	if err := yaml.UnmarshalStrict([]byte(text), &t); err != nil {
		why := err.Error()
		for _, wrapping := range []string{"error unmarshaling JSON: ", "error converting YAML to JSON: ", "while decoding JSON: ", "json: "} {
			why = strings.TrimPrefix(why, wrapping)
		}
		if strings.Contains(why, "Go value of type translate.healthCheckText") {
			why = "want fields, like {path: /healthz}"
		}
		return nil, errors.New(why)
	}
	var errs []error
	h := &mesh.HealthCheck{Path: t.Path, Host: t.Host, Service: t.Service}
	if h.Protocol, ok = healthProtocols[t.Protocol]; !ok {
		errs = append(errs, fmt.Errorf("protocol: %q is none of HTTP, TCP and GRPC", t.Protocol))
	}
	h.Port = uint16(within(&errs, "port", t.Port, 0, 65535))
	h.Unhealthy = uint32(within(&errs, "unhealthyThreshold", t.UnhealthyThreshold, defaultCheckUnhealthy, 1000))
	h.Healthy = uint32(within(&errs, "healthyThreshold", t.HealthyThreshold, defaultCheckHealthy, 1000))
	h.Interval = lasting(&errs, "interval", t.Interval, defaultCheckInterval)
	h.Timeout = lasting(&errs, "timeout", t.Timeout, min(defaultCheckTimeout, max(h.Interval, 1)))
	if why := h.Validate(); why != "" && len(errs) == 0 {
		errs = append(errs, errors.New(why))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return h, nil
}

// within is a number that must lie between 1 and most, where it is said.
func within(errs *[]error, field string, n *int64, otherwise, most int64) int64 {
	switch {
	case n == nil:
		return otherwise
	case *n < 1 || *n > most:
		*errs = append(*errs, fmt.Errorf("%s: %d is not between 1 and %d", field, *n, most))
		return otherwise
	}
	return *n
}

func lasting(errs *[]error, field string, text *string, otherwise time.Duration) time.Duration {
	if text == nil {
		return otherwise
	}
	d, err := time.ParseDuration(*text)
	if err != nil {
		*errs = append(*errs, fmt.Errorf("%s: %q is no duration, like 10s", field, *text))
		return otherwise
	}
	return d
}

// healthCheckFaults says what of the annotation has no effect. older are the rules before this one about the same host.
func healthCheckFaults(f *faults, dr *DestinationRule, older []*DestinationRule) {
	h, err := healthCheck(dr)
	if err != nil {
		f.add(Invalid, "annotation %s: %s; endpoints are not asked", AnnotationHealthCheck, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	if h == nil {
		return
	}
	for _, o := range older {
		if has, _ := healthCheck(o); has != nil {
			f.add(Conflicted, "annotation %s: that of DestinationRule %s counts, which is older", AnnotationHealthCheck, o.Name)
			return
		}
	}
}
