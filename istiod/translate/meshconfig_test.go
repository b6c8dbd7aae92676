package translate_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/istiod/translate"
)

// TestAccessLogFormat is honoured, or the default stays and the status of the ConfigMap says why.
func TestAccessLogFormat(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ mesh, format, says string }{
		{"{}", "", ""},
		{"accessLogFormat: '%PROTOCOL% %DURATION%'", "%PROTOCOL% %DURATION%", ""},
		{"accessLogFormat: '%PROTOCOL% %CEL(1)% %FILTER_STATE(a)% %CEL(2)%'", "%PROTOCOL% %CEL(1)% %FILTER_STATE(a)% %CEL(2)%",
			"accessLogFormat: waypoints know no value of CEL, FILTER_STATE, and write - or null"},
		{"accessLogFormat: '%TOOK% %REQ(A)% %DURATION:3%'", "", "accessLogFormat: waypoints keep their default: %TOOK% is no operator that is known, %DURATION% takes no length"},
		{"{accessLogFormat: '{\"a\": \"%DURATION%\"}', accessLogEncoding: json}", `{"a": "%DURATION%"}`, ""},
		{"{accessLogFormat: '%DURATION%', accessLogEncoding: JSON}", "",
			"accessLogFormat: waypoints keep their default: no JSON object: invalid character '%' looking for beginning of value"},
	} {
		m, err := translate.ReadMeshConfig(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": c.mesh}})
		if err != nil {
			t.Errorf("%s: %v", c.mesh, err)
			continue
		}
		says := ""
		if s := m.Status(translate.Config{}); s != nil {
			says = s.Message
		}
		if m.AccessLogFormat != c.format || says != c.says {
			t.Errorf("%s is the format %q and says %q, want %q and %q", c.mesh, m.AccessLogFormat, says, c.format, c.says)
		}
	}
}
