{{- /* Labels of every object of this chart. */ -}}
{{- define "cni.labels" -}}
app.kubernetes.io/name: istio-cni
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
{{- define "cni.image" -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{ .Values.hub | default .Values.global.hub }}/{{ .Values.image }}:{{ .Values.tag | default .Values.global.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- /* The level of the log and its form. */ -}}
{{- define "cni.logEnv" -}}
- name: LOG_LEVEL
  value: {{ include "cni.logLevel" . | quote }}
- name: LOG_FORMAT
  value: {{ ternary "json" "plain" .Values.global.logAsJson }}
{{- end -}}

{{- define "cni.logLevel" -}}
{{ .Values.logLevel | default (.Values.logging.level | default .Values.global.logging.level | replace "default:" "" | replace ":" "=") }}
{{- end -}}

{{- /* Where a platform's runtime looks for plugins and their configuration, unless the user says it. */ -}}
{{- define "cni.binDir" -}}
{{- $known := dict "openshift" "/var/lib/cni/bin" "gke" "/home/kubernetes/bin" "k3d" "/bin" "k3s" "/var/lib/rancher/k3s/data/cni" "microk8s" "/var/snap/microk8s/current/opt/cni/bin" -}}
{{ .Values.cniBinDir | default (get $known .Values.global.platform) | default "/opt/cni/bin" }}
{{- end -}}
{{- define "cni.confDir" -}}
{{- $known := dict "openshift" "/etc/cni/multus/net.d" "k3d" "/var/lib/rancher/k3s/agent/etc/cni/net.d" "k3s" "/var/lib/rancher/k3s/agent/etc/cni/net.d" "microk8s" "/var/snap/microk8s/current/args/cni-network" -}}
{{ .Values.cniConfDir | default (get $known .Values.global.platform) | default "/etc/cni/net.d" }}
{{- end -}}

{{- /* Every template begins with it: what the user wrote under cni goes over the rest, once. */ -}}
{{- define "cni.values" -}}
{{- if .Values.cni }}{{ $_ := mustMergeOverwrite .Values .Values.cni }}{{ $_ := unset .Values "cni" }}{{ end -}}
{{- end -}}
