"""The Helm chart, rendered by `tests.support.helm`: valid objects, and the same as the manifests say."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]  # it has no annotations
import pytest
import yaml

from proxy import __version__
from proxy.config import Config, load
from tests.support.helm import Chart
from tests.test_kubernetes import CACHE, NODES, VERSIONS, only_document

ROOT = Path(__file__).parents[1]
CHART = Chart(ROOT / "config" / "helm" / "pullcache")
# Values that switch on everything.
ALL: dict[str, Any] = {
    "edges": {"enabled": True, "nodeSelector": {"disk": "ssd"}},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "imagePullSecrets": [{"name": "registry"}],
    "extraConfig": '[[preload]]\nimages = ["nginx:1.27"]\n',
    "upstreams": {"registry.example:5000": {"url": "http://registry.example:5000"}},
    "central": {
        "storage": {"className": "fast"},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"operator": "Exists"}],
    },
}
MONITORING_KINDS = ("ServiceMonitor", "PrometheusRule")


def only(kind: str, values: Any = None, component: str = "") -> Any:
    """Return the only object of a kind, or of a kind and component."""
    (found,) = [
        one
        for one in CHART.documents(values)
        if one["kind"] == kind and one["metadata"]["name"].endswith(component)
    ]
    return found


def configuration(name: str, directory: Path, values: Any = None) -> Config:
    """Load one of the files in the chart's ConfigMap."""
    maps = [one for one in CHART.documents(values) if one["kind"] == "ConfigMap"]
    (data,) = [one["data"] for one in maps if "pullcache.toml" in one["data"]]
    (directory / name).write_text(data[name])
    return load(directory / name, {}, {})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "all"])
def test_every_object_is_valid(values: Any, version: str):
    kinds = []
    for document in CHART.documents(values):
        kinds.append(document["kind"])
        if document["kind"] not in MONITORING_KINDS:
            kubernetes_validate.validate(document, version, strict=True)
    assert {"ConfigMap", "Service", "StatefulSet", "DaemonSet", "NetworkPolicy"} <= {*kinds}
    assert set(MONITORING_KINDS) <= {*kinds} or not values


def test_the_central_cache_is_the_one_of_the_manifests():
    chart, manifest = only("StatefulSet"), only_document("StatefulSet", CACHE)
    ours, theirs = (one["spec"]["template"]["spec"] for one in (chart, manifest))
    (container,), (wanted,) = ours.pop("containers"), theirs.pop("containers")
    for key in ("ports", "securityContext", "startupProbe", "livenessProbe", "readinessProbe"):
        assert container[key] == wanted[key], key
    assert container["resources"] == wanted["resources"]
    assert container["volumeMounts"] == wanted["volumeMounts"]
    assert container["image"] == wanted["image"] == f"registry.example/pullcache:{__version__}"
    for key in ("automountServiceAccountToken", "securityContext", "terminationGracePeriodSeconds"):
        assert ours[key] == theirs[key]


def test_the_configuration_is_the_one_of_the_manifests(tmp_path: Path):
    wanted = tmp_path / "wanted.toml"
    wanted.write_text(only_document("ConfigMap", CACHE)["data"]["pullcache.toml"])
    assert configuration("pullcache.toml", tmp_path) == load(wanted, {}, {})
    assert configuration("nodes.toml", tmp_path).upstreams == load(wanted, {}, {}).upstreams


def test_the_script_of_the_nodes_is_the_one_of_the_manifests():
    script = only_document("ConfigMap", NODES)["data"]["write-hosts"]
    assert (CHART.directory / "files" / "write-hosts").read_text() == script
    (data,) = [one["data"] for one in CHART.documents() if one["kind"] == "ConfigMap"]
    assert data["write-hosts"].rstrip() == script.rstrip()


def test_selectors_and_labels_agree():
    for document in CHART.documents(ALL):
        if document["kind"] in ("StatefulSet", "DaemonSet"):
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"] == labels
    central = only("StatefulSet", ALL)["spec"]["template"]["metadata"]["labels"]
    services = [one for one in CHART.documents(ALL) if one["kind"] == "Service"]
    assert all(one["spec"]["selector"] == central for one in services)
    assert only("NetworkPolicy", ALL)["spec"]["podSelector"]["matchLabels"] == central
    # Prometheus scrapes the central cache once, although it has more names with edges.
    monitored = only("ServiceMonitor", ALL)["spec"]["selector"]["matchLabels"]
    found = [one for one in services if monitored.items() <= one["metadata"]["labels"].items()]
    assert [one["metadata"]["name"] for one in found] == ["cache"]


def test_edges_ask_the_central_cache_by_a_name_for_each_registry(tmp_path: Path):
    central = configuration("pullcache.toml", tmp_path, ALL)
    edge = configuration("edge.toml", tmp_path, ALL)
    assert edge.upstreams.keys() == central.upstreams.keys()
    services = {
        f"http://{one['metadata']['name']}.images.svc:5000"
        for one in CHART.documents(ALL)
        if one["kind"] == "Service"
    }
    assert {str(one.url) for one in edge.upstreams.values()} == services
    for name, settings in edge.upstreams.items():
        host = settings.url.removeprefix("http://").removesuffix(":5000")
        assert (name == "docker.io") or host in central.upstreams[name].hosts
    (container,) = only("DaemonSet", ALL, "-edge")["spec"]["template"]["spec"]["containers"]
    assert container["args"][-2:] == ["--max-size", "10GiB"]
    (hosts,) = only("DaemonSet", ALL, "-nodes")["spec"]["template"]["spec"]["containers"]
    address = {one["name"]: one.get("value") for one in hosts["env"]}["CACHE"]
    assert address == f"http://127.0.0.1:{container['ports'][0]['hostPort']}"


def test_values_reach_the_objects(tmp_path: Path):
    assert configuration("pullcache.toml", tmp_path, ALL).preload[0].images == ("nginx:1.27",)
    claim = only("StatefulSet", ALL)["spec"]["volumeClaimTemplates"][0]["spec"]
    assert claim["storageClassName"] == "fast"
    assert only("DaemonSet", ALL, "-edge")["spec"]["template"]["spec"]["nodeSelector"] == {
        "kubernetes.io/os": "linux",
        "disk": "ssd",
    }
    assert only("PrometheusRule", ALL)["spec"] == yaml.safe_load(
        (ROOT / "config" / "prometheus" / "pullcache.rules.yml").read_text()
    )
    base = {"prometheusRule": {"enabled": True, "runbookBase": "https://git.example/main/"}}
    groups = only("PrometheusRule", base)["spec"]["groups"]
    books = [one["annotations"]["runbook_url"] for one in groups[-1]["rules"] if "alert" in one]
    assert books
    assert all(one.startswith("https://git.example/main/config/prometheus/") for one in books)
    off = {"nodes": {"enabled": False}, "networkPolicy": {"enabled": False}}
    kinds = {one["kind"] for one in CHART.documents(off)}
    assert kinds == {"ConfigMap", "Service", "StatefulSet"}


def test_a_change_of_the_configuration_restarts_the_pods():
    sums = {
        only("StatefulSet", values)["spec"]["template"]["metadata"]["annotations"][
            "checksum/configuration"
        ]
        for values in ({}, {"extraConfig": "offline = true"})
    }
    assert len(sums) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"imagePulSecrets": []},
        {"image": {"repository": ""}},
        {"central": {"nodePort": 0}},
        {"edges": {"enabled": "yes"}},
        {"upstreams": {"ghcr.io": {"allow": {"a": "b"}}}},
        {"nodes": {"certsDirectory": "relative"}},
    ],
)
def test_the_schema_rejects_wrong_values(values: Any):
    with pytest.raises(jsonschema.ValidationError):
        CHART.render(values)


def test_the_chart_has_the_version_of_the_program():
    assert CHART.metadata["appVersion"] == CHART.metadata["version"] == __version__


@pytest.mark.skipif(
    not shutil.which("helm"),
    reason="Debian and PyPI have no helm; tests/support/helm.py renders the chart instead",
)
@pytest.mark.system
def test_helm_has_no_complaint_and_renders_the_same(tmp_path: Path):
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(ALL))
    options = ["--namespace", "images", "--values", str(tmp_path / "values.yaml")]
    subprocess.run(["helm", "lint", "--strict", str(CHART.directory), *options], check=True)
    done = subprocess.run(
        ["helm", "template", "cache", str(CHART.directory), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    rendered = [one for one in yaml.safe_load_all(done.stdout) if one]

    def sort_key(document: Any) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(rendered, key=sort_key) == sorted(CHART.documents(ALL), key=sort_key)


def test_the_kustomization_has_all_manifests():
    folder = ROOT / "config" / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert {*kustomization["resources"]} == {CACHE, NODES}
    (image,) = kustomization["images"]
    assert only_document("StatefulSet", CACHE)["spec"]["template"]["spec"]["containers"][0][
        "image"
    ] == (f"{image['name']}:{image['newTag']}")
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kinds = [one["kind"] for one in yaml.safe_load_all(done.stdout)]
        assert kinds.count("Namespace") == 2
        assert {"StatefulSet", "DaemonSet"} <= {*kinds}
