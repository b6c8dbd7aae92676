{{- /* Labels of every object of this chart. */ -}}
{{- define "istiod.labels" -}}
app.kubernetes.io/name: istiod
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: mistnet
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
istio.io/rev: {{ .Values.revision | default "default" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The image: this chart's own hub and tag, or the mesh's; an image with a slash is taken as it is. */ -}}
{{- define "istiod.image" -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{ .Values.hub | default .Values.global.hub }}/{{ .Values.image }}:{{ .Values.tag | default .Values.global.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "istiod.waypointImage" -}}
{{- if contains "/" .Values.waypoint.image -}}
{{ .Values.waypoint.image }}
{{- else -}}
{{ .Values.hub | default .Values.global.hub }}/{{ .Values.waypoint.image }}:{{ .Values.tag | default .Values.global.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* What is merged into the objects of every waypoint, and of those of one class, as istiod -help says. */ -}}
{{- define "istiod.waypointDefaults" -}}
{{- $w := .Values.global.waypoint -}}
{{- $container := dict "name" "istio-proxy" -}}
{{- with $w.resources }}{{ $_ := set $container "resources" . }}{{ end -}}
{{- with .Values.global.imagePullPolicy }}{{ $_ := set $container "imagePullPolicy" . }}{{ end -}}
{{- if eq .Values.global.platform "openshift" }}{{ $_ := set $container "securityContext" (dict "runAsUser" nil "runAsGroup" nil) }}{{ end -}}
{{- $pod := dict "containers" (list $container) -}}
{{- range $key := list "affinity" "nodeSelector" "tolerations" "topologySpreadConstraints" -}}
{{- with get $w $key }}{{ $_ := set $pod $key . }}{{ end -}}
{{- end -}}
{{- $secrets := list -}}
{{- range .Values.global.imagePullSecrets }}{{ $secrets = append $secrets (dict "name" .) }}{{ end -}}
{{- with $secrets }}{{ $_ := set $pod "imagePullSecrets" . }}{{ end -}}
{{- $all := dict "" (dict "deployment" (dict "spec" (dict "template" (dict "spec" $pod)))) -}}
{{- mustMergeOverwrite $all .Values.gatewayClasses | toJson -}}
{{- end -}}

{{- /* The level of the log and its form. */ -}}
{{- define "istiod.logEnv" -}}
- name: LOG_LEVEL
  value: {{ include "istiod.logLevel" . | quote }}
- name: LOG_FORMAT
  value: {{ ternary "json" "plain" .Values.global.logAsJson }}
{{- end -}}

{{- define "istiod.logLevel" -}}
{{ .Values.logLevel | default (include "istiod.plainLevel" .Values.global.logging.level) }}
{{- end -}}

{{- /* Istio writes default:info,ads:debug where this program's flags say info,ads=debug. */ -}}
{{- define "istiod.plainLevel" -}}
{{ . | replace "default:" "" | replace ":" "=" }}
{{- end -}}

{{- /* How many replicas there are at least: a budget for a single one would only stop nodes from being drained. */ -}}
{{- define "istiod.least" -}}
{{ ternary .Values.autoscaleMin .Values.replicaCount .Values.autoscaleEnabled }}
{{- end -}}

{{- /* Every template begins with it: what the user wrote under pilot goes over the rest, once. */ -}}
{{- define "istiod.values" -}}
{{- if .Values.pilot }}{{ $_ := mustMergeOverwrite .Values .Values.pilot }}{{ $_ := unset .Values "pilot" }}{{ end -}}
{{- end -}}

{{- /* The mesh's configuration: what the chart knows, under what the user says. */ -}}
{{- define "istiod.mesh" -}}
{{- $own := dict "rootNamespace" .Values.global.istioNamespace "trustDomain" .Values.global.trustDomain -}}
{{- mustMergeOverwrite $own .Values.meshConfig | toYaml -}}
{{- end -}}

{{- /* What is called istiod, and istio, when it is of another revision than the default one. */ -}}
{{- define "istiod.suffix" -}}
{{- if not (has .Values.revision (list "" "default")) }}-{{ .Values.revision }}{{ end -}}
{{- end -}}

{{- /* What tells its pods from those of another revision. */ -}}
{{- define "istiod.selector" -}}
app: istiod
{{- if include "istiod.suffix" . }}
istio.io/rev: {{ .Values.revision }}
{{- else }}
istio: pilot
{{- end }}
{{- end -}}
