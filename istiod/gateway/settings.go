package gateway

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Settings are what a mesh says of all its waypoints (istio.io/api/mesh/v1alpha1 MeshConfig). What is empty is the waypoint's own
// default.
type Settings struct {
	PathNormalization string // pathNormalization.normalization
	AccessLog         string // "true" or "false": accessLogFile is the output of a container, or is empty
	AccessLogEncoding string // accessLogEncoding
	AccessLogFormat   string // accessLogFormat, which waypoints can read
}

// NewSettings reads fields of a MeshConfig. No accessLogFile says nothing, an empty one turns access logs off, and any other
// turns them on: waypoints write to their standard output only.
func NewSettings(normalization string, accessLogFile *string, accessLogEncoding, accessLogFormat string) (s Settings, err error) {
	s.PathNormalization, s.AccessLogEncoding = strings.ToUpper(normalization), strings.ToUpper(accessLogEncoding)
	s.AccessLogFormat = accessLogFormat
	if all := []string{"", "DEFAULT", "NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"}; !slices.Contains(all, s.PathNormalization) {
		return s, fmt.Errorf("pathNormalization.normalization: %q is none of %s", normalization, strings.Join(all[1:], ", "))
	}
	if all := []string{"", "TEXT", "JSON"}; !slices.Contains(all, s.AccessLogEncoding) {
		return s, fmt.Errorf("accessLogEncoding: %q is neither TEXT nor JSON", accessLogEncoding)
	}
	if accessLogFile != nil {
		s.AccessLog = "true"
		if *accessLogFile == "" {
			s.AccessLog = "false"
		}
	}
	return s, nil
}

// env are the variables of waypoint's flags. Kubernetes would expand $(…) in a format.
func (s Settings) env() (env []corev1.EnvVar) {
	for _, v := range []corev1.EnvVar{
		{Name: "PATH_NORMALIZATION", Value: s.PathNormalization},
		{Name: "ACCESS_LOG", Value: s.AccessLog},
		{Name: "ACCESS_LOG_ENCODING", Value: s.AccessLogEncoding},
		{Name: "ACCESS_LOG_FORMAT", Value: strings.ReplaceAll(s.AccessLogFormat, "$", "$$")},
	} {
		if v.Value != "" {
			env = append(env, v)
		}
	}
	return env
}
