{{/* The name of everything the release makes. */}}
{{- define "rlhf.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The labels by which the operator's pod is selected. They never change. */}}
{{- define "rlhf.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The labels of everything the release makes. */}}
{{- define "rlhf.labels" -}}
{{ include "rlhf.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The account under which the operator talks to the API server. */}}
{{- define "rlhf.account" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "rlhf.name" .) -}}
{{- else -}}
{{- required "serviceAccount.name must name an existing account where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* An image: repository and tag, by default the chart's appVersion. */}}
{{- define "rlhf.image" -}}
{{- $tag := .image.tag | default .chart.AppVersion -}}
{{- printf "%s:%s" .image.repository $tag -}}
{{- end -}}

{{/* The Secret from which the keys to the progress of trainers follow. */}}
{{- define "rlhf.keySecret" -}}
{{- printf "%s-key" (include "rlhf.name" . | trunc 59 | trimSuffix "-") -}}
{{- end -}}

{{/* The operator's pods, as a peer of a NetworkPolicy. */}}
{{- define "rlhf.peer" -}}
namespaceSelector:
  matchLabels:
    kubernetes.io/metadata.name: {{ .Release.Namespace }}
podSelector:
  matchLabels:
    {{- include "rlhf.selector" . | nindent 4 }}
{{- end -}}
