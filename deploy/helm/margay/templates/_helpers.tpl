{{/* The image of every component, as the operator puts it together of an Installation. */}}
{{- define "margay.image" -}}
{{- $path := trimAll "/" .Values.image.path -}}
{{- printf "%s%s%smargay:%s" (default "margay.io/" .Values.image.registry) (empty $path | ternary "" (printf "%s/" $path)) .Values.image.prefix .Chart.AppVersion -}}
{{- end }}
