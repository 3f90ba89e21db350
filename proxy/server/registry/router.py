"""The request line, parsed once into values that cannot be wrong; strings end here.

The raw path is matched from the right, since a repository may have parts named `blobs` or
`manifests`, and against the grammars, so that nothing percent-encoded, empty or upward gets through.
Which upstream is meant: the first part of the path, else `?ns=`, else the `Host` header, else
Docker Hub (`cache/naming.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from proxy.config import UpstreamSettings
from proxy.errors import InvalidTagError, UnknownNameError
from proxy.names import Names
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, parse_name, parse_reference

Kind = Literal["manifest", "blob", "tags", "referrers"]

_PATH = re.compile(r"/v2/(.+)/(manifests|blobs|tags|referrers)/([^/]+)")
_KINDS: Mapping[str, Kind] = {
    "manifests": "manifest",
    "blobs": "blob",
    "tags": "tags",
    "referrers": "referrers",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is for. `reference` is a `Digest` for blobs and referrers."""

    kind: Kind
    repository: Repository
    reference: Reference | None


class Router:
    """Finds the target of a request among the configured upstreams."""

    def __init__(self, upstreams: Mapping[str, UpstreamSettings]) -> None:
        self._names = Names(upstreams)
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
        upstream = namespace.lower() if namespace else named or ""
        repository = self._names.repository(parse_name(name), upstream)
        self._names.check(repository)
        if kind == "manifest":
            return Target(kind, repository, parse_reference(text))
        if kind == "tags":
            if text != "list":
                raise InvalidTagError("tags are listed at /v2/<name>/tags/list")
            return Target(kind, repository, None)
        return Target(kind, repository, Digest.parse(text))

    def upstream_of(self, host: str | None) -> str | None:
        """Return the upstream that a `Host` header means, None if it means none."""
        if not host or not self._hosts:
            return None
        host = host.lower()
        return self._hosts.get(host) or self._hosts.get(host.rpartition(":")[0])
