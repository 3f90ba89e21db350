"""The Kubernetes manifests, checked by Kubernetes' schemas, by our loader, and by running them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no annotations
import pytest
import yaml

from proxy import __version__
from proxy.config import Config, load

FOLDER = Path(__file__).parents[1] / "config" / "kubernetes"
CACHE, NODES, EDGES = "cache.yaml", "nodes.yaml", "edges.yaml"
VERSIONS = ("1.29", "1.37")
MARK = "# Written by pullcache's DaemonSet"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def only_document(kind: str, name: str) -> Any:
    (document,) = [one for one in documents(name) if one["kind"] == kind]
    return document


def pod_spec(kind: str, name: str) -> Any:
    return only_document(kind, name)["spec"]["template"]["spec"]


def load_config(name: str, directory: Path) -> Config:
    """Load the pullcache.toml in the ConfigMap of a manifest."""
    file = directory / name
    file.write_text(only_document("ConfigMap", name)["data"]["pullcache.toml"])
    return load(file, {}, {})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [CACHE, NODES, EDGES])
def test_every_field_is_valid(name: str, version: str):
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validation_rejects_an_unknown_field():
    broken = only_document("StatefulSet", CACHE)
    broken["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_the_pods_run_with_least_privilege():
    for kind, name in (("StatefulSet", CACHE), ("DaemonSet", NODES), ("DaemonSet", EDGES)):
        spec = pod_spec(kind, name)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert (
                container["securityContext"].items()
                >= {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }.items()
            )
    cache = pod_spec("StatefulSet", CACHE)["securityContext"]
    assert cache["runAsNonRoot"]
    assert {cache["runAsUser"], cache["runAsGroup"], cache["fsGroup"]} == {65532}


def test_ports_probes_and_volumes_match_the_configuration(tmp_path: Path):
    config = load_config(CACHE, tmp_path)
    (container,) = pod_spec("StatefulSet", CACHE)["containers"]
    (port,) = container["ports"]
    assert [one.port for one in config.server.listen] == [port["containerPort"]]
    assert not config.server.listen[0].is_loopback
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["startupProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert config.store.path.is_relative_to(mounts["store"])
    assert mounts["configuration"] == "/etc/pullcache"
    (claim,) = only_document("StatefulSet", CACHE)["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "store"
    assert container["image"].endswith(f":{__version__}")


def test_the_grace_period_is_longer_than_a_shutdown_takes(tmp_path: Path):
    seconds = pod_spec("StatefulSet", CACHE)["terminationGracePeriodSeconds"]
    assert seconds >= load_config(CACHE, tmp_path).server.shutdown_timeout + 10


def test_service_and_network_policy_select_the_cache():
    labels = only_document("StatefulSet", CACHE)["spec"]["template"]["metadata"]["labels"]
    service, policy = (
        only_document("Service", CACHE)["spec"],
        only_document("NetworkPolicy", CACHE)["spec"],
    )
    assert only_document("StatefulSet", CACHE)["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert only_document("StatefulSet", CACHE)["spec"]["serviceName"] == "pullcache"
    (allowed,) = policy["ingress"]
    assert allowed["ports"] == [{"protocol": "TCP", "port": "registry"}]


def test_edges_ask_the_central_cache_by_a_name_for_each_registry(tmp_path: Path):
    edge, central = load_config(EDGES, tmp_path), load_config(CACHE, tmp_path)
    assert edge.upstreams.keys() == central.upstreams.keys()
    services = [one for one in documents(EDGES) if one["kind"] == "Service"]
    services += [one for one in documents(CACHE) if one["kind"] == "Service"]
    (labels,) = {str(one["spec"]["selector"]) for one in services}
    assert labels == str(only_document("StatefulSet", CACHE)["spec"]["selector"]["matchLabels"])
    names = {f"http://{one['metadata']['name']}.pullcache.svc:5000" for one in services}
    assert {str(one.url) for one in edge.upstreams.values()} == names
    # What the head of the file tells to add to the central cache makes each name mean its registry.
    for name, settings in edge.upstreams.items():
        host = settings.url.authority.partition(":")[0]
        wanted = "pullcache" if name == "docker.io" else f"pullcache-{name.replace('.', '-')}"
        assert host == f"{wanted}.pullcache.svc"


def test_an_edge_is_like_the_central_cache_and_open_to_its_own_node_alone(tmp_path: Path):
    edge, central = pod_spec("DaemonSet", EDGES), pod_spec("StatefulSet", CACHE)
    (ours,), (theirs,) = edge["containers"], central["containers"]
    (port,) = ours["ports"]
    assert port == {**theirs["ports"][0], "hostPort": 30501, "hostIP": "127.0.0.1"}
    for key in ("image", "securityContext", "startupProbe", "livenessProbe", "readinessProbe"):
        assert ours[key] == theirs[key]
    assert edge["securityContext"] == central["securityContext"]
    config = load_config(EDGES, tmp_path)
    assert edge["terminationGracePeriodSeconds"] >= config.server.shutdown_timeout + 10
    # The pod is not evicted before the store has reached its limit.
    (size,) = [one["emptyDir"]["sizeLimit"] for one in edge["volumes"] if "emptyDir" in one]
    assert config.store.max_size.to_bytes(0) < int(size.removesuffix("Gi")) << 30
    assert ours["resources"]["limits"]["ephemeral-storage"] == size


def test_the_network_policies_let_edges_reach_the_central_cache_and_nothing_else():
    policies = [one for one in documents(EDGES) if one["kind"] == "NetworkPolicy"]
    into, out = (one["spec"] for one in policies)
    edge = {"app.kubernetes.io/name": "pullcache-edge"}
    cache = {"app.kubernetes.io/name": "pullcache"}
    assert only_document("DaemonSet", EDGES)["spec"]["selector"]["matchLabels"] == edge
    assert (into["podSelector"]["matchLabels"], out["podSelector"]["matchLabels"]) == (cache, edge)
    ((source,),) = [one["from"] for one in into["ingress"]]
    assert source["podSelector"]["matchLabels"] == edge
    named = source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert named == only_document("DaemonSet", EDGES)["metadata"]["namespace"]
    dns, central = out["egress"]
    assert {one["port"] for one in dns["ports"]} == {53}
    assert central["to"][0]["podSelector"]["matchLabels"] == cache
    assert out["policyTypes"] == ["Egress"]


def test_nodes_use_the_node_port_for_the_upstreams_of_the_cache(tmp_path: Path):
    assert load_config(NODES, tmp_path).upstreams == load_config(CACHE, tmp_path).upstreams
    (container,) = pod_spec("DaemonSet", NODES)["containers"]
    (port,) = only_document("Service", CACHE)["spec"]["ports"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["CACHE"] == f"http://$(NODE_ADDRESS):{port['nodePort']}"
    volumes = {one["name"]: one for one in pod_spec("DaemonSet", NODES)["volumes"]}
    assert volumes["certs"]["hostPath"]["path"] == "/etc/containerd/certs.d"


class FakeNode:
    """A node that runs the script of the DaemonSet on its certs.d."""

    def __init__(self, directory: Path) -> None:
        self.certs = directory / "certs.d"
        self.certs.mkdir()
        data = only_document("ConfigMap", NODES)["data"]
        self._script = directory / "write-hosts"
        self._script.write_text(data["write-hosts"])
        self.config = directory / "pullcache.toml"
        self.config.write_text(data["pullcache.toml"])

    def run(self) -> list[str]:
        """Run the script until it is done, stop it as Kubernetes does, and return its output."""
        programs = Path(sys.executable).parent
        process = subprocess.Popen(
            ["/bin/sh", self._script],
            env={
                "PATH": f"{programs}:{os.environ['PATH']}",
                "CACHE": "http://10.0.0.7:30500",
                "CERTS": str(self.certs),
                "PULLCACHE_CONFIG": str(self.config),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        output = []
        try:
            for line in process.stdout:
                output.append(line.strip())
                if line.startswith("done"):
                    self.written = {name: self.read(name) for name in self.names()}
                    break
        finally:
            process.terminate()
            assert process.wait(30) == 0
            process.stdout.close()
        return output

    def names(self) -> Iterator[str]:
        return (path.parent.name for path in self.certs.glob("*/hosts.toml"))

    def read(self, name: str) -> str:
        return (self.certs / name / "hosts.toml").read_text()


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return FakeNode(tmp_path)


def test_a_node_gets_a_hosts_file_for_every_upstream_until_the_daemonset_is_removed(node: FakeNode):
    node.run()
    assert set(node.written) == {"docker.io", "ghcr.io", "quay.io", "registry.k8s.io"}
    for text in node.written.values():
        assert text.startswith(MARK)
        assert '[host."http://10.0.0.7:30500"]' in text
    assert list(node.certs.iterdir()) == []


def test_foreign_hosts_files_are_left_alone(node: FakeNode):
    foreign = node.certs / "ghcr.io" / "hosts.toml"
    foreign.parent.mkdir()
    foreign.write_text('server = "https://ghcr.io"\n')
    node.run()
    assert foreign.read_text() == 'server = "https://ghcr.io"\n'
    assert list(node.certs.iterdir()) == [foreign.parent]


def test_files_that_a_crash_has_left_are_kept_updated_or_removed(node: FakeNode):
    node.run()
    for name, text in node.written.items():
        (node.certs / name).mkdir()
        (node.certs / name / "hosts.toml").write_text(text)
    outdated, removed = node.certs / "quay.io", node.certs / "old.example"
    removed.mkdir()
    for directory in (outdated, removed):
        (directory / "hosts.toml").write_text(f"{node.written['quay.io'].splitlines()[0]}\nold\n")
    before = dict(node.written)
    output = node.run()
    assert node.written == before
    assert "docker.io unchanged" in output
    assert "quay.io written" in output
    assert "old.example removed: no longer an upstream" in output
