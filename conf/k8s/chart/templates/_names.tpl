{{- define "forebay.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "forebay.selector" -}}
app.kubernetes.io/name: forebay
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "forebay.labels" -}}
{{ include "forebay.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* What the chart writes into the configuration wins: probes, volumes and times of the pod depend on it. */}}
{{- define "forebay.config" -}}
{{- $config := deepCopy .Values.config }}
{{- $shutdown := dict "pause" (printf "%ds" (int .Values.drain.pauseSeconds)) "deadline" (printf "%ds" (int .Values.drain.deadlineSeconds)) }}
{{- $server := mergeOverwrite (default dict $config.server) (dict "spool_dir" "/var/lib/forebay/spool" "shutdown" $shutdown) }}
{{- $admin := mergeOverwrite (default dict $config.admin) (dict "address" (printf "0.0.0.0:%d" (int .Values.admin.port))) }}
{{- if .Values.admin.token.name }}{{- $_ := set $admin "token" "${FOREBAY_ADMIN_TOKEN}" }}{{- end }}
{{- toYaml (mergeOverwrite $config (dict "server" $server "admin" $admin)) }}
{{- end }}
