{{- /* Labels of every object of this chart. */ -}}
{{- define "ztunnel.labels" -}}
app.kubernetes.io/name: ztunnel
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
{{- define "ztunnel.image" -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{ .Values.hub | default .Values.global.hub }}/{{ .Values.image }}:{{ .Values.tag | default .Values.global.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* The level of the log and its form. */ -}}
{{- define "ztunnel.logEnv" -}}
- name: LOG_LEVEL
  value: {{ include "ztunnel.logLevel" . | quote }}
- name: LOG_FORMAT
  value: {{ ternary "json" "plain" .Values.global.logAsJson }}
{{- end -}}

{{- define "ztunnel.logLevel" -}}
{{ .Values.logLevel }}
{{- end -}}

{{- /* The control plane's name, which its certificate has, and its address. */ -}}
{{- define "ztunnel.istiodName" -}}
istiod{{ if not (has .Values.revision (list "" "default")) }}-{{ .Values.revision }}{{ end }}.{{ .Values.istioNamespace | default .Values.global.istioNamespace }}.svc
{{- end -}}
{{- define "ztunnel.istiod" -}}
https://{{ .Values.global.remotePilotAddress | default (include "ztunnel.istiodName" .) }}:15012
{{- end -}}
