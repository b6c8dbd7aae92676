package manifests_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	meshv1alpha1 "istio.io/api/mesh/v1alpha1"
	"sigs.k8s.io/yaml"
)

// What the schemas say beyond the kinds of the default values, by path; * is any chart or part of it.
var (
	scalar      = map[string]any{"type": []string{"string", "number", "boolean"}}
	level       = map[string]any{"type": "string", "pattern": `^$|^(([a-z0-9_-]+)[:=])?(trace|debug|info|warn|error|off)(,([a-z0-9_-]+)[:=](trace|debug|info|warn|error|off))*$`}
	hostPath    = map[string]any{"type": "string", "pattern": `^$|^/`}
	count       = map[string]any{"type": "integer", "minimum": 0}
	atLeastOne  = map[string]any{"type": "integer", "minimum": 1}
	portion     = map[string]any{"type": []string{"string", "integer"}, "pattern": `^[0-9]+%$|^[0-9]+$`}
	texts       = map[string]any{"type": "array", "items": map[string]any{"type": "string"}}
	textMap     = map[string]any{"type": "object", "additionalProperties": map[string]any{"type": "string"}}
	environment = map[string]any{"type": "object", "additionalProperties": scalar}
	revision    = map[string]any{"type": "string", "pattern": `^$|^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$`}
	oneRevision = map[string]any{"enum": []string{"", "default"}}
)

func oneOf(words ...string) map[string]any { return map[string]any{"enum": words} }

var narrower = map[string]any{
	"*/profile":                       oneOf("", "ambient", "default", "demo", "minimal", "empty", "preview", "remote", "openshift", "stable"),
	"*/revision":                      oneRevision,
	"istiod/revision":                 revision,
	"istiod/global/revision":          revision,
	"istiod/revisionTags":             map[string]any{"type": "array", "items": revision},
	"ztunnel/revision":                revision,
	"*/defaultRevision":               oneRevision,
	"*/tag":                           map[string]any{"type": []string{"string", "number"}},
	"*/imagePullPolicy":               oneOf("", "Always", "IfNotPresent", "Never"),
	"*/imagePullSecrets":              texts,
	"*/logLevel":                      level,
	"*/logging/level":                 level,
	"*/env":                           environment,
	"*/labels":                        textMap,
	"*/podLabels":                     textMap,
	"*/podAnnotations":                textMap,
	"*/annotations":                   textMap,
	"*/nodeSelector":                  textMap,
	"*/extraContainerArgs":            texts,
	"*/terminationGracePeriodSeconds": count,
	"*/global/platform":               oneOf("", "gke", "openshift", "k3s", "k3d", "microk8s", "minikube"),
	"*/global/nativeNftables":         map[string]any{"enum": []any{true, false, "auto"}},
	"base/base/excludedCRDs":          texts,
	"cni/ambient/enabled":             map[string]any{"enum": []bool{true}},
	"cni/cniBinDir":                   hostPath,
	"cni/cniConfDir":                  hostPath,
	"cni/cniNetnsDir":                 map[string]any{"type": "string", "pattern": "^/"},
	"cni/excludeNamespaces":           texts,
	"cni/rollingMaxUnavailable":       portion,
	"istiod/replicaCount":             count,
	"istiod/autoscaleMin":             atLeastOne,
	"istiod/autoscaleMax":             atLeastOne,
	"istiod/rollingMaxSurge":          portion,
	"istiod/rollingMaxUnavailable":    portion,
	"istiod/ipFamilyPolicy":           oneOf("", "SingleStack", "PreferDualStack", "RequireDualStack"),
	"istiod/ipFamilies":               map[string]any{"type": "array", "items": oneOf("IPv4", "IPv6")},
	"istiod/meshConfig":               meshConfigSchema(),
	"ztunnel/meshConfig":              meshConfigSchema(),
	"ztunnel/updateStrategy/rollingUpdate/maxSurge":       portion,
	"ztunnel/updateStrategy/rollingUpdate/maxUnavailable": portion,
}

// meshConfigSchema knows the names of the fields of Istio's MeshConfig: a misspelt one is refused, and the rest is what
// istiod judges.
func meshConfigSchema() map[string]any {
	fields := (&meshv1alpha1.MeshConfig{}).ProtoReflect().Descriptor().Fields()
	properties := make(map[string]any)
	for i := range fields.Len() {
		properties[fields.Get(i).JSONName()] = map[string]any{}
	}
	return map[string]any{"type": "object", "properties": properties, "additionalProperties": false}
}

// derive is the schema of what a chart's default values show: these names and kinds, and no others. What is empty by
// default is free inside.
func derive(at string, value any) any {
	_, rest, _ := strings.Cut(at, "/")
	for _, key := range []string{at, "*/" + rest, "*/" + path.Base(at)} {
		if s, ok := narrower[key]; ok {
			return s
		}
	}
	// Under global a setting has the same meaning as in the chart.
	if s, ok := narrower["*/"+strings.TrimPrefix(rest, "global/")]; ok {
		return s
	}
	switch v := value.(type) {
	case map[string]any:
		if len(v) == 0 {
			return map[string]any{"type": "object"}
		}
		properties := make(map[string]any)
		for name, part := range v {
			properties[name] = derive(at+"/"+name, part)
		}
		// Kubernetes' own structures have fields that the defaults do not name; the API server checks them.
		open := slices.ContainsFunc(strings.Split(at, "/"), func(key string) bool {
			return slices.Contains([]string{"resources", "nodeSelector", "seccompProfile"}, key)
		})
		return map[string]any{"type": "object", "properties": properties, "additionalProperties": open}
	case []any:
		return map[string]any{"type": "array"}
	case bool:
		return map[string]any{"type": "boolean"}
	case float64, int64:
		return map[string]any{"type": "integer"}
	case string:
		return map[string]any{"type": "string"}
	}
	panic(fmt.Sprintf("%s has the kind %T", at, value))
}

// schema is the schema of a chart's values.
func schema(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("charts", name, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.UnmarshalStrict(text, &values); err != nil {
		t.Fatal(err)
	}
	schema := derive(name, values).(map[string]any)
	// Istio's older spelling, with its own values once more under the component's name.
	if older := map[string]string{"istiod": "pilot", "cni": "cni"}[name]; older != "" {
		properties := schema["properties"].(map[string]any)
		inner := maps.Clone(properties)
		delete(inner, "global")
		properties[older] = map[string]any{"type": "object", "properties": inner, "additionalProperties": false}
	}
	schema["$schema"] = "http://json-schema.org/draft-07/schema#"
	out, err := json.MarshalIndent(schema, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(out, '\n')
}

// writeSchemas compares the schemas with the files, or with -update writes these.
func writeSchemas(t *testing.T) {
	t.Helper()
	for _, name := range parts {
		golden(t, filepath.Join("charts", name, "values.schema.json"), schema(t, name))
	}
}

func TestSchemasFollowTheValues(t *testing.T) { writeSchemas(t) }

// Every chart takes the same global values: the umbrella and mistctl hand all of them to each.
func TestGlobalValuesAreTheSameEverywhere(t *testing.T) {
	want, err := json.Marshal(load(t, "istiod").Values["global"])
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range parts {
		got, err := json.Marshal(load(t, name).Values["global"])
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != string(want) {
			t.Errorf("global of %s is %s, of istiod %s", name, got, want)
		}
	}
}

func TestWrongValuesAreRefusedByName(t *testing.T) {
	tests := []struct{ chart, values, want string }{
		{"istiod", "replicaCont: 2", "'replicaCont' not allowed"},
		{"istiod", "pilot: {autoscaleEnable: true}", "'autoscaleEnable' not allowed"},
		{"istiod", "replicaCount: many", "/replicaCount"},
		{"istiod", "logLevel: loud", "/logLevel"},
		{"istiod", "meshConfig: {trustDomian: x}", "'trustDomian' not allowed"},
		{"istiod", "global: {imagePullPolicy: Sometimes}", "/global/imagePullPolicy"},
		{"istiod", "revision: Canary!", "/revision"},
		{"cni", "revision: canary", "/revision"},
		{"cni", "ambient: {dnsCaptur: true}", "'dnsCaptur' not allowed"},
		{"cni", "cniConfDir: etc/cni", "/cniConfDir"},
		{"cni", "cni: {excludeNamespaces: kube-system}", "/cni/excludeNamespaces"},
		{"cni", "ambient: {enabled: false}", "/ambient/enabled"},
		{"ztunnel", "global: {platfrom: gke}", "'platfrom' not allowed"},
		{"ztunnel", "terminationGracePeriodSeconds: -1", "/terminationGracePeriodSeconds"},
		{"base", "base: {enableCRDs: true}", "'enableCRDs' not allowed"},
		{"ambient", "ztunel: {}", "'ztunel' not allowed"},
		{"ambient", "ztunnel: {logLevl: info}", "'logLevl' not allowed"},
	}
	for _, tt := range tests {
		t.Run(tt.chart+" "+tt.values, func(t *testing.T) {
			var values map[string]any
			if err := yaml.UnmarshalStrict([]byte(tt.values), &values); err != nil {
				t.Fatal(err)
			}
			if _, err := render(t, tt.chart, values); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("render error = %v, want %q in it", err, tt.want)
			}
		})
	}
}
