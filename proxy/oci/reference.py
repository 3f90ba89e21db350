"""Repository names, tags and references (OCI distribution-spec, "Pulling manifests")."""

import re
from dataclasses import dataclass

import msgspec

from proxy.errors import InvalidNameError, InvalidTagError
from proxy.oci.digest import Digest

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME_PATTERN = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
# The part before the slash in `localhost:5000/app`: a name, an IPv4 or [IPv6] address, and a port.
_HOST_PATTERN = re.compile(r"(?:[a-z0-9][a-z0-9.-]*|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_TAG_PATTERN = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

# The limit of clients, for host and name together.
MAX_NAME_LENGTH = 255


class Tag(str):
    """A tag, which upstream may move. Its own type, so that other text is never passed as one."""

    __slots__ = ()


Reference = Tag | Digest


class Repository(msgspec.Struct, frozen=True, cache_hash=True):
    """A repository at an upstream; `name` is the name there (`library/nginx`)."""

    upstream: str
    name: str


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image name as a user writes it; missing parts are "" or None, without any defaults."""

    host: str
    path: str
    tag: Tag | None = None
    digest: Digest | None = None


def parse_repository_name(text: str) -> str:
    """Return `text` if it is a valid repository name, or raise `InvalidNameError`."""
    if len(text) > MAX_NAME_LENGTH or _NAME_PATTERN.fullmatch(text) is None:
        raise InvalidNameError(
            f"{text[:80]!r} is not a repository name: lower-case letters, digits and . _ - "
            f"between slashes, at most {MAX_NAME_LENGTH} characters"
        )
    return text


def parse_tag(text: str) -> Tag:
    """Parse a tag, or raise `InvalidTagError`."""
    if _TAG_PATTERN.fullmatch(text) is None:
        raise InvalidTagError(
            f"{text[:80]!r} is not a tag: at most 128 letters, digits and . _ -, "
            "not beginning with . or -"
        )
    return Tag(text)


def parse_reference(text: str) -> Reference:
    """Parse a digest if `text` contains a colon, else a tag (distribution-spec, "Definitions").

    Raises `InvalidDigestError` or `InvalidTagError`.
    """
    return Digest.parse(text) if ":" in text else parse_tag(text)


def is_host(part: str) -> bool:
    """Tell whether the first part of an image name is a registry, by the rule of all clients."""
    return part == "localhost" or "." in part or ":" in part


def parse_image(text: str) -> ImageName:
    """Parse `[host/]path[:tag][@digest]`; the host is lower-cased.

    Raises `InvalidNameError`, `InvalidTagError` or `InvalidDigestError`.
    """
    name, at, digest = text.partition("@")
    # A colon before the last slash belongs to a port.
    before, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    host, path = "", f"{before}{slash}{last}"
    first, slash, rest = path.partition("/")
    if slash and is_host(first):
        host, path = first.lower(), rest
        if _HOST_PATTERN.fullmatch(host) is None:
            raise InvalidNameError(f"{first[:80]!r} is not a registry name: use host or host:port")
    return ImageName(
        host,
        parse_repository_name(path),
        parse_tag(tag) if colon else None,
        Digest.parse(digest) if at else None,
    )
