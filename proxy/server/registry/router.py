"""Parsing the path of a request into values that are valid by construction.

The raw path is matched from the right, since a repository may have parts named `blobs` or
`manifests`, and against the grammars, which reject percent-encoded and empty parts and `..`. `?ns=` names
the upstream, else a `Host` header that an upstream lists; then the whole path is the repository. Else the
first part of the path may name it; the default is Docker Hub (`proxy/names.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from proxy.config import UpstreamSettings
from proxy.errors import InvalidTagError, UnknownNameError
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, parse_reference, parse_repository_name

ResourceKind = Literal["manifest", "blob", "tags", "referrers"]

_PATH = re.compile(r"/v2/(.+)/(manifests|blobs|tags|referrers)/([^/]+)")
_KIND_BY_COLLECTION: Mapping[str, ResourceKind] = {
    "manifests": "manifest",
    "blobs": "blob",
    "tags": "tags",
    "referrers": "referrers",
}


@dataclass(frozen=True, slots=True, eq=False)
class TargetResource:
    """The resource that a request names. `reference` is a `Digest` for blobs and referrers.

    Repeated requests get the same object, which is its own key in a dictionary.
    """

    kind: ResourceKind
    repository: Repository
    reference: Reference | None
    reference_text: str = ""


class Router:
    """Finds the resource that a request names, among the configured upstreams."""

    def __init__(self, upstreams: Mapping[str, UpstreamSettings]) -> None:
        self._names = NameParser(upstreams)
        # Clients repeat the same few paths, and parsing one costs as much as answering it.
        self._parse_cached = lru_cache(maxsize=4096)(self._parse)
        self._hosts = {
            host.lower(): name for name, settings in upstreams.items() for host in settings.hosts
        }

    def parse(self, path: str, namespace: str | None, host: str | None) -> TargetResource:
        """Return the resource at a path under `/v2/`, without its query.

        Raises `InvalidReferenceError`, `DeniedError`, and `UnknownNameError` for any other path.
        """
        return self._parse_cached(path, namespace, self.find_upstream(host))

    def _parse(self, path: str, namespace: str | None, host_upstream: str | None) -> TargetResource:
        match = _PATH.fullmatch(path)
        if match is None:
            raise UnknownNameError("there is nothing at this path; images are under /v2/<name>/")
        name, collection, text = match.groups()
        kind = _KIND_BY_COLLECTION[collection]
        upstream = namespace.lower() if namespace else host_upstream or ""
        repository = self._names.parse_repository(parse_repository_name(name), upstream)
        self._names.check_allowed(repository)
        if kind == "manifest":
            return TargetResource(kind, repository, parse_reference(text), text)
        if kind == "tags":
            if text != "list":
                raise InvalidTagError("tags are listed at /v2/<name>/tags/list")
            return TargetResource(kind, repository, None)
        return TargetResource(kind, repository, Digest.parse(text), text)

    def find_upstream(self, host: str | None) -> str | None:
        """Return the upstream whose `hosts` include a `Host` header; None if there is none."""
        if not host or not self._hosts:
            return None
        host = host.lower()
        return self._hosts.get(host) or self._hosts.get(host.rpartition(":")[0])
