{{/*
Names. A release's name may have dots and begin with a digit, which a Service's name may not.
*/}}
{{- define "rlhf.chart" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of everything the release makes in its own namespace. */}}
{{- define "rlhf.name" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $chart := include "rlhf.chart" . -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name) -}}
{{- end -}}
{{- $name = $name | lower | replace "." "-" -}}
{{- ternary $name (printf "r-%s" $name) (regexMatch "^[a-z]" $name) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of what it makes in no namespace: another release may have the same name in another. */}}
{{- define "rlhf.clusterName" -}}
{{- printf "%s.%s" .Release.Namespace (include "rlhf.name" .) -}}
{{- end -}}

{{/* The labels by which the operator's pod is selected. They never change: a Deployment's selector cannot. */}}
{{- define "rlhf.selector" -}}
app.kubernetes.io/name: {{ include "rlhf.chart" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/*
The label by which the ServiceMonitor selects the Service: Argo CD may write its application's name over
app.kubernetes.io/instance of whatever it deploys.
*/}}
{{- define "rlhf.ownLabel" -}}
rlhf.dev/operator: {{ include "rlhf.name" . }}
{{- end -}}

{{/* The labels of everything the release makes; with "of", those of one object besides, and with "pod" those of pods. */}}
{{- define "rlhf.labels" -}}
{{- $own := include "rlhf.selector" . | fromYaml -}}
{{- $own = merge $own (include "rlhf.ownLabel" . | fromYaml) -}}
{{- $own = merge $own (dict "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/managed-by" .Release.Service) -}}
{{- $own = merge $own (dict "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")) -}}
{{- merge $own (.Values.commonLabels | default dict) | toYaml -}}
{{- end -}}

{{/*
metadata of an object: list $ "suffix of the name" LABELS ANNOTATIONS. The release's labels cannot be taken by others.
*/}}
{{- define "rlhf.metadata" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s%s" (include "rlhf.name" $root) (index . 1) -}}
{{- include "rlhf.meta" (list $root $name $root.Release.Namespace (index . 2) (index . 3)) -}}
{{- end -}}

{{/* The same of an object with any name, in any namespace, or in none. */}}
{{- define "rlhf.meta" -}}
{{- $root := index . 0 -}}
{{- $meta := dict "name" (index . 1) "labels" (merge (include "rlhf.labels" $root | fromYaml) (index . 3 | default dict)) -}}
{{- with index . 2 }}{{ $_ := set $meta "namespace" . }}{{ end -}}
{{- with merge (dict) (index . 4 | default dict) ($root.Values.commonAnnotations | default dict) }}{{ $_ := set $meta "annotations" . }}{{ end -}}
{{- toYaml $meta -}}
{{- end -}}

{{/* The account under which the operator talks to the API server. */}}
{{- define "rlhf.account" -}}
{{- $account := .Values.serviceAccount | default (dict "create" true) -}}
{{- if $account.create -}}
{{- $account.name | default (include "rlhf.name" .) -}}
{{- else -}}
{{- required "serviceAccount.name must name an existing account where serviceAccount.create is false" $account.name -}}
{{- end -}}
{{- end -}}

{{/*
An image: list $ IMAGE "repository". By tag (by default the chart's appVersion), by digest, or by both. A repository that begins
with a registry, as a whole name does (what comes before its first slash has a dot or a port, or is localhost), needs no other but
the global one.
*/}}
{{- define "rlhf.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 | default dict -}}
{{- $name := $image.repository | default (index . 2) -}}
{{- $whole := regexMatch "^([^/]*[.:][^/]*|localhost)/" $name -}}
{{- $registry := ($root.Values.global).imageRegistry | default (ternary "" $image.registry $whole) -}}
{{- with $registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if $image.digest -}}
{{- with $image.tag }}{{ $name = printf "%s:%s" $name . }}{{ end -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name ($image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "rlhf.operatorImage" -}}
{{- include "rlhf.image" (list . .Values.image "rlhf/operator") -}}
{{- end -}}

{{- define "rlhf.trainerImage" -}}
{{- include "rlhf.image" (list . (.Values.trainer).image "rlhf/trainer") -}}
{{- end -}}

{{/* The names of pull secrets, as YAML under "names": list $ SECRETS, with the global ones before. */}}
{{- define "rlhf.pullSecrets" -}}
{{- $names := list -}}
{{- range concat (((index . 0).Values.global).imagePullSecrets | default list) (index . 1 | default list) -}}
{{- $names = append $names (kindIs "map" . | ternary (get (kindIs "map" . | ternary . dict) "name") .) -}}
{{- end -}}
{{- dict "names" (uniq $names) | toYaml -}}
{{- end -}}

{{/* "true" where user ids are left to the cluster. */}}
{{- define "rlhf.omitUserIds" -}}
{{- $omit := toString .Values.omitUserIds -}}
{{- if or (eq $omit "true") (and (ne $omit "false") (.Capabilities.APIVersions.Has "security.openshift.io/v1")) }}true{{ end -}}
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
