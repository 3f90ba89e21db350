"""Kubernetes objects, the output of helm, and hauler manifests."""

import json

from proxy.preload.lists import parse_list
from tests.support.image_lists import errors, images, notes, only, platforms

HELM = """\
---
# Source: shop/templates/configmap.yaml
apiVersion: v1
kind: ConfigMap
metadata:
  name: shop
data:
  image: not-an-image-of-a-container
  config.yaml: |
    image: neither/is/this
---
# Source: shop/templates/deployment.yaml
apiVersion: apps/v1
kind: Deployment
metadata:
  name: shop
  annotations:
    image: nor/this
spec:
  template:
    spec:
      initContainers:
        - name: wait
          image: "busybox:1.36"
      containers:
        - name: app
          image: ghcr.io/shop/app:1.4
        - image: docker.io/envoyproxy/envoy:v1.31.0
          name: proxy
      volumes:
        - name: model
          image:
            reference: ghcr.io/shop/model:7
            pullPolicy: IfNotPresent
status:
  image: old/one
---
# Source: shop/templates/empty.yaml
---
# Source: shop/templates/job.yaml
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec:
  jobTemplate:
    spec:
      template:
        spec:
          containers:
            - name: app
              image: ghcr.io/shop/app:1.4
            - name: report
              image: ghcr.io/shop/report@sha256:XYZ
          ephemeralContainers: [{name: debug, image: alpine}]
"""


def test_images_of_every_kind_of_object_are_found_and_nothing_else():
    assert parse_list(HELM).format == "Kubernetes"
    assert images(HELM) == [
        (24, "busybox:1.36"),
        (27, "ghcr.io/shop/app:1.4"),
        (28, "docker.io/envoyproxy/envoy:v1.31.0"),
        (33, "ghcr.io/shop/model:7"),
        (54, "alpine"),
    ]


def test_an_invalid_image_is_an_error_with_its_line():
    line, message = only(errors(HELM))
    assert line == 53
    assert "is not a digest" in message


def test_a_list_of_objects_in_json_is_read():
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"image": "nginx:1"}]}}
    crd = {"apiVersion": "x/v1", "kind": "CustomResourceDefinition", "spec": {"image": "no"}}
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [pod, crd]}, indent=4)
    image_list = parse_list(text)
    (entry,) = image_list.entries
    assert entry.reference == "nginx:1"
    assert '"nginx:1"' in text.splitlines()[entry.line - 1]
    assert image_list.problems == ()


def test_images_of_custom_resources_are_found():
    text = """\
    apiVersion: monitoring.coreos.com/v1
    kind: Prometheus
    spec:
      image: quay.io/prometheus/prometheus:v2.54.1
      thanos:
        image: {registry: quay.io, repository: thanos/thanos, tag: 0.36}
      exporter:
        image:
          repository: ghcr.io/shop/exporter
          digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
      reloader:
        image: {repository: ghcr.io/shop/reloader, tag: ""}
      logo: {image: "https://shop.example/Logo.png"}
      disk: {image: {size: 3}}
      empty: {image: }
      many: {image: [nginx]}
    """
    digest = "0123456789abcdef" * 4
    assert images(text) == [
        (4, "quay.io/prometheus/prometheus:v2.54.1"),
        (6, "quay.io/thanos/thanos:0.36"),
        (9, f"ghcr.io/shop/exporter@sha256:{digest}"),
    ]
    line, message = only(errors(text))
    assert line == 12
    assert "neither tag nor digest" in message
    assert only(notes(text))[0] == 13


def test_a_container_without_an_image_is_an_error():
    text = "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n    - image: ''\n"
    assert only(errors(text))[0] == 5


def test_an_unreadable_document_is_an_error_and_the_others_are_read():
    text = HELM.replace("kind: Deployment", "kind: [Deployment")
    assert images(text) == [(51, "ghcr.io/shop/app:1.4"), (54, "alpine")]
    (line, message), _ = errors(text)
    assert line == 15
    assert "the document at line 11 cannot be read" in message


def test_unrendered_helm_templates_are_errors_and_the_others_are_read():
    text = """\
    {{- if .Values.enabled }}
    apiVersion: v1
    kind: Pod
    metadata:
      name: {{ include "shop.name" . }}
      labels:
        {{- include "shop.labels" . | nindent 4 }}
    spec:
      containers:
        - image: {{ .Values.image }}
        - image: "{{ .Values.repository }}:{{ .Values.tag }}"
        - image: ghcr.io/shop/app:{{ .Values.it's }}
        - image: {{ .Values.isn't }}
        - image: nginx
        - {{ .Values.sidecar }}
    {{- end }}
    """
    assert images(text) == [(14, "nginx")]
    assert [line for line, _ in errors(text)] == [10, 11, 12, 13]
    assert all("is a template: render it first" in message for _, message in errors(text))


def test_the_report_around_a_helm_dry_run_is_ignored():
    report = f"NAME: shop\nSTATUS: pending-install\nHOOKS:\n---\n{HELM}\nMANIFEST:\n---\n{HELM}"
    text = f"{report}\nNOTES:\n1. Open the shop: http://shop.example\n  image: {{{{x\n"
    assert images(text)[0] == (24 + 4, "busybox:1.36")
    assert len(images(text)) == 5
    assert len(errors(text)) == 2
    assert images(f"NAME: shop\nMANIFEST:\n{HELM}")[0] == (26, "busybox:1.36")


def test_directives_aliases_and_tags_are_read():
    text = """\
    %YAML 1.1
    ---
    apiVersion: v1
    kind: Pod
    spec:
      containers: &all
        - &one {image: !!str nginx}
        - *one
        - !custom {image: alpine}
      initContainers: *all
      ? [a, key]
      : {image: redis}
    ...
    """
    assert images(text) == [(7, "nginx"), (9, "alpine")]
    assert errors(text) == []


def test_objects_to_be_rendered_first_are_notes():
    text = """\
    apiVersion: kustomize.config.k8s.io/v1beta1
    kind: Kustomization
    images: [{name: nginx, newTag: "1.27"}]
    ---
    apiVersion: helm.cattle.io/v1
    kind: HelmChart
    spec: {chart: traefik}
    """
    assert [line for line, _ in notes(text)] == [1, 5]
    assert images(text) == []


HAULER = """\
apiVersion: content.hauler.cattle.io/v1
kind: Images
metadata:
  name: shop
  annotations:
    hauler.dev/platform: linux/amd64
    hauler.dev/registry: registry.shop.example
spec:
  images:
    - name: ghcr.io/shop/app:1.4
    - name: shop/tools:2
      platform: linux/arm64
      key: cosign.pub
    - name: busybox
    - busybox
---
apiVersion: content.hauler.cattle.io/v1
kind: Charts
spec:
  charts: [{name: rancher}]
"""


def test_hauler_manifests_are_read_with_their_annotations():
    assert parse_list(HAULER).format == "hauler"
    assert platforms(HAULER) == {
        "ghcr.io/shop/app:1.4": ("linux/amd64",),
        "registry.shop.example/shop/tools:2": ("linux/arm64",),
        "registry.shop.example/busybox": ("linux/amd64",),
    }
    assert [line for line, _ in images(HAULER)] == [10, 11, 14]
    assert only(errors(HAULER))[0] == 15
    assert only(notes(HAULER))[0] == 17


def test_a_hauler_manifest_may_have_names_only():
    text = "apiVersion: content.hauler.cattle.io/v1\nkind: Images\nspec: {images: [{name: nginx}]}"
    assert platforms(text) == {"nginx": ()}


def test_a_stream_of_several_formats_names_all_of_them():
    assert parse_list(f"{HAULER}---\n{HELM}").format == "hauler, Kubernetes"
