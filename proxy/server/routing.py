"""The request line, parsed once into values that cannot be wrong; strings end here.

The raw path is matched from the right, since a repository may have parts named `blobs` or
`manifests`, and against the grammars, so that nothing percent-encoded, empty or upward gets through.
Which upstream is meant: `?ns=`, else the `Host` header, else the first part of the path, else
Docker Hub. It is a closed world: what is not configured is refused, never dialled.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from proxy.cache import policy
from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.errors import DeniedError, InvalidTagError, UnknownNameError
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, parse_name, parse_reference
from proxy.storage.tables import Repository

Kind = Literal["manifest", "blob", "tags", "referrers"]

_PATH = re.compile(r"/v2/(.+)/(manifests|blobs|tags|referrers)/([^/]+)")
_KINDS: Mapping[str, Kind] = {
    "manifests": "manifest",
    "blobs": "blob",
    "tags": "tags",
    "referrers": "referrers",
}

# One registry, many names: what clients call Docker Hub (protocol of k3s, crane, containerd).
_ALIASES = {"index.docker.io": DEFAULT_UPSTREAM, "registry-1.docker.io": DEFAULT_UPSTREAM}


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is for. `reference` is a `Digest` for blobs and referrers."""

    kind: Kind
    repository: Repository
    reference: Reference | None


class Router:
    """Finds the target of a request among the configured upstreams."""

    def __init__(self, upstreams: Mapping[str, UpstreamSettings]) -> None:
        self._upstreams = upstreams
        # The same few paths come again and again, and parsing one costs as much as answering it.
        self._target = lru_cache(maxsize=4096)(self._parse)
        self._hosts = {
            host.lower(): name for name, settings in upstreams.items() for host in settings.hosts
        }

    def parse(self, path: str, namespace: str | None, host: str | None) -> Target:
        """Return the target of a path under `/v2/`, without its query.

        Raises `InvalidReferenceError`, `DeniedError`, and `UnknownNameError` for any other path.
        """
        return self._target(path, namespace, self.upstream_of(host))

    def _parse(self, path: str, namespace: str | None, named: str | None) -> Target:
        match = _PATH.fullmatch(path)
        if match is None:
            raise UnknownNameError("there is nothing here; images are under /v2/<name>/")
        name, collection, text = match.groups()
        kind = _KINDS[collection]
        repository = self._repository(parse_name(name), namespace, named)
        if kind == "manifest":
            return Target(kind, repository, parse_reference(text))
        if kind == "tags":
            if text != "list":
                raise InvalidTagError("tags are listed at /v2/<name>/tags/list")
            return Target(kind, repository, None)
        return Target(kind, repository, Digest.parse(text))

    def _repository(self, name: str, namespace: str | None, named: str | None) -> Repository:
        first, slash, rest = name.partition("/")
        upstream = DEFAULT_UPSTREAM
        if slash and first in self._upstreams:
            upstream, name = first, rest
        elif namespace:
            upstream = namespace.lower()
            upstream = _ALIASES.get(upstream, upstream)
        elif named:
            upstream = named
        elif slash and ("." in first or first == "localhost"):
            upstream = first
        if upstream not in self._upstreams:
            raise DeniedError(
                f"{upstream[:100]!r} is not configured in this cache; "
                "add it to its upstreams or pull from elsewhere"
            )
        if upstream == DEFAULT_UPSTREAM and "/" not in name:
            # Docker Hub knows official images by two parts only.
            name = f"library/{name}"
        rules = self._upstreams[upstream]
        policy.check_allowed(name, allow=rules.allow, deny=rules.deny)
        return Repository(upstream, name)

    def upstream_of(self, host: str | None) -> str | None:
        """Return the upstream that a `Host` header means, None if it means none."""
        if not host or not self._hosts:
            return None
        host = host.lower()
        return self._hosts.get(host) or self._hosts.get(host.rpartition(":")[0])
