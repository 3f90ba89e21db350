"""Configuration files that make clients pull through the cache, as text. Does no I/O.

With `only` a client asks nothing but the cache, as far as its configuration allows. Otherwise it asks the
registry itself for what the cache refuses, and bypasses the policies.

Sources: containerd `docs/hosts.md`, containers-registries.conf(5), BuildKit
`docs/buildkitd.toml.md`, k3s "Private Registry Configuration".
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM, KNOWN_REGISTRIES
from proxy.config.values import RegistryUrl

Upstreams = Mapping[str, UpstreamSettings]


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A file of a client at `directory`/`path`; `note` says how to put it into use."""

    directory: str
    path: str
    note: str
    content: str

    @property
    def header(self) -> str:
        """The file's path and the note as comment lines."""
        lines = (f"{self.directory}/{self.path}", *self.note.splitlines())
        return "".join(f"# {line}\n" for line in lines)

    @property
    def file_text(self) -> str:
        """The text to write to the file; JSON has no comments, and thus no header."""
        return self.content if self.path.endswith(".json") else f"{self.header}\n{self.content}"


def docker_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield the files of Docker 28 and later with the containerd image store."""
    note = (
        "For Docker 28 and later with the containerd image store. Read at every pull, no restart\n"
        "needed. Remove registry-mirrors from /etc/docker/daemon.json: with a mirror that is on\n"
        "loopback or insecure, docker stops verifying Docker Hub's own certificate. For any other\n"
        "docker: pullcache client-config docker --docker-file daemon.json"
    )
    yield from _hosts_toml_files("/etc/docker", "certs.d/", note, cache_url, upstreams, only=only)


def docker_mirror_files(
    cache_url: RegistryUrl,
    upstreams: Upstreams,  # noqa: ARG001 (as the others)
    *,
    only: bool = False,
) -> Iterator[ClientFile]:
    """Yield the file of a docker with the classic image store, or older than 28."""
    assert not only, "such a docker asks Docker Hub too"
    mirrors: dict[str, Any] = {"registry-mirrors": [cache_url]}
    note = (
        "Leave out these comments (JSON has none). If the file exists, add the key to it.\n"
        "Then: systemctl reload docker\n"
        "docker uses registry-mirrors for Docker Hub only. Not for Docker 28 and later with the\n"
        "containerd image store: pullcache client-config docker --docker-file hosts.toml"
    )
    if not cache_url.is_http:
        note += f"\nIf the cache has a private CA: /etc/docker/certs.d/{cache_url.authority}/ca.crt"
    yield ClientFile("/etc/docker", "daemon.json", note, f"{json.dumps(mirrors, indent=2)}\n")


def containerd_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield containerd's files, which Kubernetes uses too."""
    note = (
        "Read at every pull, no restart needed, provided that /etc/containerd/config.toml has\n"
        'config_path = "/etc/containerd/certs.d" in [plugins."io.containerd.grpc.v1.cri".registry]'
        '\n(containerd 2: [plugins."io.containerd.cri.v1.images".registry]). ctr needs --hosts-dir.'
    )
    yield from _hosts_toml_files(
        "/etc/containerd/certs.d", "", note, cache_url, upstreams, only=only
    )


def podman_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield the file of podman, buildah and skopeo."""
    note = "podman, buildah and skopeo read it at every pull, no restart needed."
    yield _registries_conf_file(note, cache_url, upstreams, only=only)


def crio_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield CRI-O's file."""
    yield _registries_conf_file("Then: systemctl reload crio", cache_url, upstreams, only=only)


def buildkit_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield the file of a standalone BuildKit; the one inside docker uses docker's mirrors."""
    note = (
        "Then: restart buildkitd, or docker buildx create --buildkitd-config FILE\n"
        "A builder in a container cannot reach 127.0.0.1 of the host."
    )
    if only:
        note = (
            "BuildKit asks the registry itself for what a mirror refuses: no file prevents that.\n"
            "Close the way to the registries by the network, or build FROM names of the cache:\n"
            f"{cache_url.authority}/library/alpine\n{note}"
        )
    tables = [f'[registry."{name}"]\n  mirrors = ["{cache_url.authority}"]\n' for name in upstreams]
    # BuildKit reads the settings of a mirror from the mirror's own table.
    scheme = "  http = true\n" if cache_url.is_http else '  # ca = ["/path/ca.crt"]\n'
    tables.append(f'[registry."{cache_url.authority}"]\n{scheme}')
    yield ClientFile("/etc/buildkit", "buildkitd.toml", note, "\n".join(tables))


def k3s_files(
    cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
) -> Iterator[ClientFile]:
    """Yield the file of k3s, which RKE2 reads too, in its own directory."""
    note = (
        "Then: systemctl restart k3s (agents: k3s-agent). RKE2: /etc/rancher/rke2/registries.yaml"
    )
    if only:
        note = f"Start k3s with --disable-default-registry-endpoint (since 2024).\n{note}"
    lines = ["mirrors:"]
    for name in [*upstreams, *(["*"] if only else [])]:
        lines += [f'  "{name}":', "    endpoint:", f'      - "{cache_url}"']
    if not cache_url.is_http:
        lines += [
            "# configs:",
            f'#   "{cache_url.authority}":',
            "#     tls: {ca_file: /path/ca.crt}",
        ]
    yield ClientFile("/etc/rancher/k3s", "registries.yaml", note, "\n".join([*lines, ""]))


class ClientFilesFunction(Protocol):
    """Yields the files of one kind of client."""

    def __call__(
        self, cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool = False
    ) -> Iterator[ClientFile]:
        """Yield the files for a cache at `cache_url`."""


CLIENT_FILES: Mapping[str, ClientFilesFunction] = {
    # The command uses `docker_mirror_files` in its place if the docker of this machine needs that.
    "docker": docker_files,
    "containerd": containerd_files,
    "podman": podman_files,
    "buildkit": buildkit_files,
    "k3s": k3s_files,
    "crio": crio_files,
}


def _hosts_toml_files(
    directory: str,
    prefix: str,
    note: str,
    cache_url: RegistryUrl,
    upstreams: Upstreams,
    *,
    only: bool,
) -> Iterator[ClientFile]:
    """Yield a hosts.toml for each upstream; requests name theirs in `?ns=`."""
    servers = {
        name: f'"{settings.url}"  # used if the cache does not answer'
        for name, settings in upstreams.items()
    }
    if only:
        # `_default` is for the registries that have no directory: the cache refuses those.
        servers = dict.fromkeys([*upstreams, "_default"], f'"{cache_url}"')
    for name, server in servers.items():
        lines = [
            f"server = {server}",
            "",
            f'[host."{cache_url}"]',
            '  capabilities = ["pull", "resolve"]',
            '  dial_timeout = "2s"  # containerd 2.0 and later; ignored before',
        ]
        if not cache_url.is_http:
            lines.append('  # ca = "/path/ca.crt"')
        content = "\n".join([*lines, ""])
        yield ClientFile(directory, f"{prefix}{name}/hosts.toml", note, content)


def _registries_conf_file(
    note: str, cache_url: RegistryUrl, upstreams: Upstreams, *, only: bool
) -> ClientFile:
    # These clients do not send the registry's name, so the mirror's path contains it.
    supported = {name: settings.url for name, settings in upstreams.items() if ":" not in name}
    if unsupported := [name for name in upstreams if name not in supported]:
        note += f"\nNot for {', '.join(unsupported)}: a path cannot contain a port."
    if not cache_url.is_http:
        authority = cache_url.authority
        note += f"\nIf the cache has a private CA: /etc/containers/certs.d/{authority}/ca.crt"
    if only:
        note += (
            "\nOther registries are still asked themselves: close the way to them by the network."
        )
    tables = []
    for name, url in supported.items():
        default = KNOWN_REGISTRIES.get(name, f"https://{name}")
        path = "" if name == DEFAULT_UPSTREAM else f"/{name}"
        if only:
            tables += [
                "[[registry]]",
                f'prefix = "{name}"',
                f'location = "{cache_url.authority}{path}"',
                *(["insecure = true  # plain http"] if cache_url.is_http else []),
                "",
            ]
            continue
        tables += [
            "[[registry]]",
            f'prefix = "{name}"',
            f'location = "{name if url == default else url.authority}"',
            *(["insecure = true"] if url.is_http else []),
            "",
            "[[registry.mirror]]",
            f'location = "{cache_url.authority}{path}"',
            *(["insecure = true  # plain http"] if cache_url.is_http else []),
            "",
        ]
    directory = "/etc/containers/registries.conf.d"
    return ClientFile(directory, "pullcache.conf", note, "\n".join(tables))
