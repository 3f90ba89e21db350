"""Repository names, tags and references (OCI distribution-spec, "Pulling manifests")."""

import re

from proxy.errors import InvalidNameError, InvalidTagError
from proxy.oci.digest import Digest

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")

# Clients cap host and name together at 255 characters; more than that is no repository.
MAX_NAME_LENGTH = 255


class Tag(str):
    """A name that upstream may move. A type of its own, so that a tag is never taken for text."""

    __slots__ = ()


Reference = Tag | Digest


def parse_name(text: str) -> str:
    """Return `text` if it is a repository name, or raise `InvalidNameError`."""
    if len(text) > MAX_NAME_LENGTH or _NAME.fullmatch(text) is None:
        raise InvalidNameError(
            f"{text[:80]!r} is not a repository name: lower-case letters, digits and . _ - "
            f"between slashes, at most {MAX_NAME_LENGTH} characters"
        )
    return text


def parse_tag(text: str) -> Tag:
    """Return the tag that `text` spells, or raise `InvalidTagError`."""
    if _TAG.fullmatch(text) is None:
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
