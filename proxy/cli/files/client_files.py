"""What clients have to be told so that they pull through the cache: their files, as text. PURE.

Facts: the clients' own documentation; containerd `docs/hosts.md`, containers-registries.conf(5), BuildKit
`docs/buildkitd.toml.md`, k3s "Private Registry Configuration".
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM, KNOWN_REGISTRIES
from proxy.config.values import RegistryUrl

Upstreams = Mapping[str, UpstreamSettings]


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A file of a client, `path` below `directory`; `note` says what to do with it, and why, in comments."""

    directory: str
    path: str
    note: str
    content: str

    @property
    def header(self) -> str:
        """Where it goes, and the note, as comments."""
        lines = (f"{self.directory}/{self.path}", *self.note.splitlines())
        return "".join(f"# {line}\n" for line in lines)

    @property
    def file_text(self) -> str:
        """What is written into it. JSON has no comments."""
        return self.content if self.path.endswith(".json") else f"{self.header}\n{self.content}"


def docker_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes docker ask `cache`: a mirror of Docker Hub, or, by containerd's store, of any registry."""
    mirrors: dict[str, Any] = {"registry-mirrors": [cache_url]}
    note = (
        "If there is such a file, add the key to it; without these lines, JSON has no comments. Then:\n"
        "systemctl reload docker\n"
        "These are mirrors of Docker Hub alone. With the containerd image store (Docker 28 and later: `docker info`\n"
        "says driver-type: io.containerd.snapshotter.v1) use certs.d below in place of it: a mirror here that is\n"
        "on loopback or insecure makes that Docker stop verifying Docker Hub's own certificate."
    )
    if not cache_url.is_http:
        note += f"\nA private CA of the cache: /etc/docker/certs.d/{cache_url.authority}/ca.crt"
    yield ClientFile("/etc/docker", "daemon.json", note, f"{json.dumps(mirrors, indent=2)}\n")
    note = "For Docker with the containerd image store. Read at every pull: nothing is restarted."
    yield from _hosts_toml_files("/etc/docker", "certs.d/", note, cache_url, upstreams)


def containerd_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes containerd, and by it Kubernetes, ask `cache`."""
    note = (
        "Read at every pull: nothing is restarted once /etc/containerd/config.toml has\n"
        'config_path = "/etc/containerd/certs.d" in [plugins."io.containerd.grpc.v1.cri".registry]\n'
        '(containerd 2: [plugins."io.containerd.cri.v1.images".registry]); ctr wants --hosts-dir.'
    )
    yield from _hosts_toml_files("/etc/containerd/certs.d", "", note, cache_url, upstreams)


def podman_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes podman, buildah and skopeo ask `cache`."""
    note = "podman, buildah and skopeo read it at every pull: nothing is restarted."
    yield _registries_conf_file(note, cache_url, upstreams)


def crio_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes CRI-O ask `cache`."""
    yield _registries_conf_file("Then: systemctl reload crio", cache_url, upstreams)


def buildkit_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes a BuildKit of its own ask `cache`; the one in docker has docker's mirrors."""
    note = (
        "Then restart buildkitd; or: docker buildx create --buildkitd-config FILE\n"
        "A builder in a container does not reach the host's 127.0.0.1."
    )
    tables = [f'[registry."{name}"]\n  mirrors = ["{cache_url.authority}"]\n' for name in upstreams]
    # What is said of the mirror stands in the mirror's own table.
    own = "  http = true\n" if cache_url.is_http else '  # ca = ["/path/ca.crt"]\n'
    tables.append(f'[registry."{cache_url.authority}"]\n{own}')
    yield ClientFile("/etc/buildkit", "buildkitd.toml", note, "\n".join(tables))


def k3s_files(cache_url: RegistryUrl, upstreams: Upstreams) -> Iterator[ClientFile]:
    """Yield what makes k3s ask `cache`."""
    note = "Then: systemctl restart k3s, or k3s-agent. RKE2: /etc/rancher/rke2/registries.yaml"
    lines = ["mirrors:"]
    for name in upstreams:
        lines += [f'  "{name}":', "    endpoint:", f'      - "{cache_url}"']
    if not cache_url.is_http:
        lines += [
            "# configs:",
            f'#   "{cache_url.authority}":',
            "#     tls: {ca_file: /path/ca.crt}",
        ]
    yield ClientFile("/etc/rancher/k3s", "registries.yaml", note, "\n".join([*lines, ""]))


CLIENT_FILES: Mapping[str, Callable[[RegistryUrl, Upstreams], Iterator[ClientFile]]] = {
    "docker": docker_files,
    "containerd": containerd_files,
    "podman": podman_files,
    "buildkit": buildkit_files,
    "k3s": k3s_files,
    "crio": crio_files,
}


def _hosts_toml_files(
    directory: str, prefix: str, note: str, cache_url: RegistryUrl, upstreams: Upstreams
) -> Iterator[ClientFile]:
    """Yield a hosts.toml for each upstream; which one is meant the client says with `?ns=`."""
    for name, settings in upstreams.items():
        lines = [
            f'server = "{settings.url}"  # asked when the cache cannot answer',
            "",
            f'[host."{cache_url}"]',
            '  capabilities = ["pull", "resolve"]',
            '  dial_timeout = "2s"  # containerd 2.0 and later; older ones ignore it',
        ]
        if not cache_url.is_http:
            lines.append('  # ca = "/path/ca.crt"')
        content = "\n".join([*lines, ""])
        yield ClientFile(directory, f"{prefix}{name}/hosts.toml", note, content)


def _registries_conf_file(note: str, cache_url: RegistryUrl, upstreams: Upstreams) -> ClientFile:
    # These clients do not say which registry they mean, so the path does; it cannot hold a port.
    named = {name: settings.url for name, settings in upstreams.items() if ":" not in name}
    if unnamed := [name for name in upstreams if name not in named]:
        note += f"\nNot for {', '.join(unnamed)}: a path cannot hold a port."
    if not cache_url.is_http:
        note += f"\nA private CA of the cache: /etc/containers/certs.d/{cache_url.authority}/ca.crt"
    tables = []
    for name, url in named.items():
        known = KNOWN_REGISTRIES.get(name, f"https://{name}")
        path = "" if name == DEFAULT_UPSTREAM else f"/{name}"
        tables += [
            "[[registry]]",
            f'prefix = "{name}"',
            f'location = "{name if url == known else url.authority}"',
            *(["insecure = true"] if url.is_http else []),
            "",
            "[[registry.mirror]]",
            f'location = "{cache_url.authority}{path}"',
            *(["insecure = true  # plain http"] if cache_url.is_http else []),
            "",
        ]
    directory = "/etc/containers/registries.conf.d"
    return ClientFile(directory, "pullcache.conf", note, "\n".join(tables))
