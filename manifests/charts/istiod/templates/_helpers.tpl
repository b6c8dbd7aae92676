{{- /* Labels of every object of this chart. */ -}}
{{- define "istiod.labels" -}}
app.kubernetes.io/name: istiod
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: mistnet
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
istio.io/rev: default
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
