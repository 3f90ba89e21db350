"""Repository names, tags and references (OCI distribution-spec, "Pulling manifests")."""

import re
from dataclasses import dataclass

from proxy.errors import InvalidNameError, InvalidTagError
from proxy.oci.digest import Digest

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME_PATTERN = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
# What is before the slash of `localhost:5000/app`: a name, an IPv4 address or [IPv6], and a port.
_HOST_PATTERN = re.compile(r"(?:[a-z0-9][a-z0-9.-]*|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_TAG_PATTERN = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

# Clients cap host and name together at 255 characters; more than that is no repository.
MAX_NAME_LENGTH = 255


class Tag(str):
    """A name that upstream may move. A type of its own, so that a tag is never taken for text."""

    __slots__ = ()


Reference = Tag | Digest


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of an upstream; `name` as upstream knows it (`library/nginx`)."""

    upstream: str
    name: str

    def __hash__(self) -> int:
        # A string remembers its hash; the one of a dataclass costs a microsecond a request.
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image as people write it. What is not written is "" or None; `tag` does not default to latest."""

    host: str
    path: str
    tag: Tag | None = None
    digest: Digest | None = None


def parse_repository_name(text: str) -> str:
    """Return `text` if it is a repository name, or raise `InvalidNameError`."""
    if len(text) > MAX_NAME_LENGTH or _NAME_PATTERN.fullmatch(text) is None:
        raise InvalidNameError(
            f"{text[:80]!r} is not a repository name: lower-case letters, digits and . _ - "
            f"between slashes, at most {MAX_NAME_LENGTH} characters"
        )
    return text


def parse_tag(text: str) -> Tag:
    """Return the tag that `text` spells, or raise `InvalidTagError`."""
    if _TAG_PATTERN.fullmatch(text) is None:
        raise InvalidTagError(
            f"{text[:80]!r} is not a tag: at most 128 letters, digits and . _ -, "
            "not beginning with . or -"
        )
    return Tag(text)


def parse_reference(text: str) -> Reference:
    """Return a digest if `text` holds a colon, else a tag (distribution-spec, definitions).

    Raises `InvalidDigestError` or `InvalidTagError`.
    """
    return Digest.parse(text) if ":" in text else parse_tag(text)


def is_host(part: str) -> bool:
    """Tell whether the first part of an image's name is a registry's, as every client decides it."""
    return part == "localhost" or "." in part or ":" in part


def parse_image(text: str) -> ImageName:
    """Return what `[host/]path[:tag][@digest]` says; the host in lower case.

    Raises `InvalidNameError`, `InvalidTagError` or `InvalidDigestError`.
    """
    named, at, digest = text.partition("@")
    # A colon before the last slash is a port's.
    before, slash, last = named.rpartition("/")
    last, colon, tag = last.partition(":")
    host, path = "", f"{before}{slash}{last}"
    first, slash, rest = path.partition("/")
    if slash and is_host(first):
        host, path = first.lower(), rest
        if _HOST_PATTERN.fullmatch(host) is None:
            raise InvalidNameError(f"{first[:80]!r} is not a registry: use host or host:port")
    return ImageName(
        host,
        parse_repository_name(path),
        parse_tag(tag) if colon else None,
        Digest.parse(digest) if at else None,
    )
