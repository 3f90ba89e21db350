{{- define "pullcache.labels" -}}
app.kubernetes.io/name: pullcache
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "pullcache.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "pullcache.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pullcache.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "pullcache.probes" -}}
# If the index was lost, the daemon reads the files of the store before it serves clients.
startupProbe:
  httpGet: {path: /healthz, port: registry}
  periodSeconds: 5
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /healthz, port: registry}
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 4
readinessProbe:
  httpGet: {path: /readyz, port: registry}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end -}}
