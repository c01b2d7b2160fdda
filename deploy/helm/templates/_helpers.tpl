{{- define "gateway.name" -}}
{{ .Release.Name | trunc 53 | trimSuffix "-" }}
{{- end }}

{{- define "gateway.selector" -}}
app.kubernetes.io/name: model-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "gateway.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "gateway.claim" -}}
{{ .Values.models.existingClaim | default (printf "%s-models" (include "gateway.name" .)) }}
{{- end }}

{{- define "gateway.settings" -}}
{{- $registry := .Values.registry.uri | default "/registry/registry.yaml" -}}
{{- $made := dict "registry" $registry -}}
{{- if .Values.cache.sharedClaim }}{{ $_ := set $made "cache_dir" "/var/cache/gateway" }}{{ end -}}
{{ toYaml (merge $made (.Values.settings | default dict)) }}
{{- end }}
