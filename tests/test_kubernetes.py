"""The Kubernetes manifests: by Kubernetes' own schemas, by our own loader, and what they run."""

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
CACHE, NODES = "cache.yaml", "nodes.yaml"
VERSIONS = ("1.29", "1.37")
MARK = "# Written by pullcache's DaemonSet"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def the(kind: str, name: str) -> Any:
    (found,) = [one for one in documents(name) if one["kind"] == kind]
    return found


def pod(kind: str, name: str) -> Any:
    return the(kind, name)["spec"]["template"]["spec"]


def configuration(name: str, place: Path) -> Config:
    """Return what the pullcache.toml in a manifest says to the daemon."""
    file = place / name
    file.write_text(the("ConfigMap", name)["data"]["pullcache.toml"])
    return load(file, {}, {})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [CACHE, NODES])
def test_kubernetes_knows_every_field(name: str, version: str):
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_own_schema_refuses_a_field_that_does_not_exist():
    broken = the("StatefulSet", CACHE)
    broken["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_nothing_in_the_pods_has_more_rights_than_it_needs():
    for kind, name in (("StatefulSet", CACHE), ("DaemonSet", NODES)):
        spec = pod(kind, name)
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
    cache = pod("StatefulSet", CACHE)["securityContext"]
    assert cache["runAsNonRoot"]
    assert {cache["runAsUser"], cache["runAsGroup"], cache["fsGroup"]} == {65532}


def test_the_cache_is_asked_where_it_listens_and_stores_on_its_volume(tmp_path: Path):
    config = configuration(CACHE, tmp_path)
    (container,) = pod("StatefulSet", CACHE)["containers"]
    (port,) = container["ports"]
    assert [one.port for one in config.server.listen] == [port["containerPort"]]
    assert not config.server.listen[0].is_loopback
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["startupProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert config.store.path.is_relative_to(mounts["store"])
    assert mounts["configuration"] == "/etc/pullcache"
    (claim,) = the("StatefulSet", CACHE)["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "store"
    assert container["image"].endswith(f":{__version__}")


def test_a_stop_is_given_longer_than_the_daemon_takes(tmp_path: Path):
    seconds = pod("StatefulSet", CACHE)["terminationGracePeriodSeconds"]
    assert seconds >= configuration(CACHE, tmp_path).server.shutdown_timeout + 10


def test_services_and_policies_mean_the_cache():
    labels = the("StatefulSet", CACHE)["spec"]["template"]["metadata"]["labels"]
    service, policy = the("Service", CACHE)["spec"], the("NetworkPolicy", CACHE)["spec"]
    assert the("StatefulSet", CACHE)["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert the("StatefulSet", CACHE)["spec"]["serviceName"] == "pullcache"
    (allowed,) = policy["ingress"]
    assert allowed["ports"] == [{"protocol": "TCP", "port": "registry"}]


def test_nodes_ask_the_node_port_for_what_the_cache_has(tmp_path: Path):
    assert configuration(NODES, tmp_path).upstreams == configuration(CACHE, tmp_path).upstreams
    (container,) = pod("DaemonSet", NODES)["containers"]
    (port,) = the("Service", CACHE)["spec"]["ports"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["CACHE"] == f"http://$(NODE_ADDRESS):{port['nodePort']}"
    volumes = {one["name"]: one for one in pod("DaemonSet", NODES)["volumes"]}
    assert volumes["certs"]["hostPath"]["path"] == "/etc/containerd/certs.d"


class Node:
    """Runs what the DaemonSet runs, on a certs.d of its own."""

    def __init__(self, place: Path) -> None:
        self.certs = place / "certs.d"
        self.certs.mkdir()
        self._place = place
        data = the("ConfigMap", NODES)["data"]
        self._script = place / "write-hosts"
        self._script.write_text(data["write-hosts"])
        self.config = place / "pullcache.toml"
        self.config.write_text(data["pullcache.toml"])

    def run(self) -> list[str]:
        """Start it, wait until it is done, end it as Kubernetes does; return what it said."""
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
        said = []
        try:
            for line in process.stdout:
                said.append(line.strip())
                if line.startswith("done"):
                    self.seen = {name: self.read(name) for name in self.names()}
                    break
        finally:
            process.terminate()
            assert process.wait(30) == 0
            process.stdout.close()
        return said

    def names(self) -> Iterator[str]:
        return (path.parent.name for path in self.certs.glob("*/hosts.toml"))

    def read(self, name: str) -> str:
        return (self.certs / name / "hosts.toml").read_text()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_node_is_told_of_every_upstream_and_nothing_stays_when_the_daemonset_goes(node: Node):
    node.run()
    assert set(node.seen) == {"docker.io", "ghcr.io", "quay.io", "registry.k8s.io"}
    for text in node.seen.values():
        assert text.startswith(MARK)
        assert '[host."http://10.0.0.7:30500"]' in text
    assert list(node.certs.iterdir()) == []


def test_hosts_files_of_others_are_left_alone(node: Node):
    theirs = node.certs / "ghcr.io" / "hosts.toml"
    theirs.parent.mkdir()
    theirs.write_text('server = "https://ghcr.io"\n')
    node.run()
    assert theirs.read_text() == 'server = "https://ghcr.io"\n'
    assert list(node.certs.iterdir()) == [theirs.parent]


def test_what_a_crash_left_is_kept_where_it_is_right_and_mended_where_not(node: Node):
    node.run()
    for name, text in node.seen.items():
        (node.certs / name).mkdir()
        (node.certs / name / "hosts.toml").write_text(text)
    wrong, gone = node.certs / "quay.io", node.certs / "old.example"
    gone.mkdir()
    for directory in (wrong, gone):
        (directory / "hosts.toml").write_text(f"{node.seen['quay.io'].splitlines()[0]}\nold\n")
    before = dict(node.seen)
    said = node.run()
    assert node.seen == before
    assert "docker.io is as it should be" in said
    assert "quay.io is written" in said
    assert "old.example is no upstream any more: removed" in said
