"""Image names: parsing them into repositories of upstreams, and displaying repositories. Pure.

Upstreams that are not configured are refused; the cache never connects to them.
"""

from collections.abc import Mapping, Sequence

from proxy.config import UpstreamSettings
from proxy.config.schema import DEFAULT_UPSTREAM
from proxy.errors import DeniedError, InvalidReferenceError
from proxy.globs import matches_any
from proxy.oci.digest import Digest
from proxy.oci.reference import ImageName, Reference, Repository, Tag, is_host, parse_image

DEFAULT_TAG = Tag("latest")

# Docker Hub's namespace of official images.
OFFICIAL_PREFIX = "library/"

# Other names by which clients (k3s, crane, containerd) know Docker Hub.
_HOST_ALIASES = {"index.docker.io": DEFAULT_UPSTREAM, "registry-1.docker.io": DEFAULT_UPSTREAM}


class NameParser:
    """Parses names into repositories of the configured upstreams."""

    def __init__(self, upstreams: Mapping[str, UpstreamSettings]) -> None:
        self._upstreams = upstreams

    def parse_allowed(self, text: str) -> tuple[Repository, Reference]:
        """Parse an image name such as `nginx`, `ghcr.io/me/app:1` or `app@sha256:…`.

        A digest takes precedence over a tag; without either the tag is `latest`. Raises
        `InvalidReferenceError`, and `DeniedError` if it may not be pulled.
        """
        repository, reference = self.to_repository(parse_image(text))
        self.check_allowed(repository)
        return repository, reference

    def to_repository(self, image: ImageName) -> tuple[Repository, Reference]:
        """Return repository and reference of `image`, without checking whether it is allowed."""
        reference = image.digest or image.tag or DEFAULT_TAG
        if image.host:
            return normalize_repository(image.host, image.path), reference
        return self.parse_repository(image.path), reference

    def full_name(self, text: str) -> str:
        """Return the full name of an image; text that is no name stays as it is, but not long."""
        try:
            return full_name(*self.to_repository(parse_image(text)))
        except InvalidReferenceError:
            return text[:100]

    def parse_repository(self, path: str, upstream: str = "") -> Repository:
        """Return the repository of a path, without checking whether it is allowed.

        `upstream` is the one that the request names outside the path, if any: then the whole path
        is the repository. Otherwise the first part of the path is the upstream if it is configured
        or looks like a host; the default is Docker Hub.
        """
        if upstream:
            return normalize_repository(upstream, path)
        first, slash, rest = path.partition("/")
        if slash and (_HOST_ALIASES.get(first, first) in self._upstreams or is_host(first)):
            return normalize_repository(first, rest)
        return normalize_repository(DEFAULT_UPSTREAM, path)

    def check_allowed(self, repository: Repository) -> None:
        """Raise `DeniedError` unless the upstream is configured and allows the repository.

        Docker Hub has no namespace that looks like a host. A second cache that is configured as
        Docker Hub would take it for another registry and bypass `deny`, so such names are rejected.
        """
        rules = self._upstreams.get(repository.upstream)
        if rules is None:
            raise DeniedError(
                f"{repository.upstream[:100]!r} is not configured in this cache; "
                "add it to its upstreams or pull from elsewhere"
            )
        first, slash, _ = repository.name.partition("/")
        if repository.upstream == DEFAULT_UPSTREAM and slash and is_host(first):
            raise DeniedError(
                f"docker.io has no repository {repository.name[:60]!r}; "
                f"if you mean the registry {first[:40]!r}, name it without docker.io"
            )
        check_allowed(repository.name, allow=rules.allow, deny=rules.deny)

    @property
    def unrestricted_upstreams(self) -> list[str]:
        """The upstreams whose configuration allows all repositories."""
        return [
            name for name, rules in self._upstreams.items() if "*" in rules.allow and not rules.deny
        ]

    def is_allowed(self, repository: Repository) -> bool:
        """Tell whether clients may pull the repository; a stored one may be denied now."""
        try:
            self.check_allowed(repository)
        except DeniedError:
            return False
        return True


def normalize_repository(upstream: str, name: str) -> Repository:
    """Return the repository under its upstream's own name, as `library/nginx` at `docker.io`."""
    upstream = _HOST_ALIASES.get(upstream, upstream)
    if upstream == DEFAULT_UPSTREAM and "/" not in name:
        name = f"{OFFICIAL_PREFIX}{name}"
    return Repository(upstream, name)


def check_allowed(name: str, *, allow: Sequence[str], deny: Sequence[str]) -> None:
    """Raise `DeniedError` unless a glob of `allow`, and none of `deny`, matches the name."""
    if matches_any(name, deny) or not matches_any(name, allow):
        raise DeniedError(f"the configuration of this cache does not allow {name[:120]}")


def display_name(repository: Repository, reference: Reference | None = None) -> str:
    """Return the name as people write it: `nginx:1.25` for Docker Hub's `library/nginx`."""
    name = repository.name
    if repository.upstream == DEFAULT_UPSTREAM:
        short = name.removeprefix(OFFICIAL_PREFIX)
        if "/" not in short:
            name = short
        elif is_host(name.partition("/")[0]):
            name = f"{DEFAULT_UPSTREAM}/{name}"
    else:
        name = f"{repository.upstream}/{name}"
    if reference is None:
        return name
    return f"{name}@{reference}" if isinstance(reference, Digest) else f"{name}:{reference}"


def full_name(repository: Repository, reference: Reference) -> str:
    """Return the name with registry and namespace: `docker.io/library/nginx:1.25`."""
    mark = "@" if isinstance(reference, Digest) else ":"
    return f"{repository.upstream}/{repository.name}{mark}{reference}"


def policy_name(repository: Repository) -> str:
    """Return the name that the globs of policies match: `docker.io/library/nginx`."""
    return f"{repository.upstream}/{repository.name}"
