"""Packages of an image, whatever manager installed them. Pure."""

import re
from collections.abc import Iterable
from typing import Literal

import msgspec

PackageKind = Literal["deb", "apk", "rpm", "pypi", "npm", "other"]

# Longer texts of a database are cut: names, versions, paths.
MAX_TEXT = 300

_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


class Package(msgspec.Struct, frozen=True, omit_defaults=True):
    """An installed package. `source` is the source package that it was built from, if that has another name.

    `source_version` is its version, if that is another one. `path` is the file in the image that names it,
    empty if an SBOM does.
    """

    kind: PackageKind
    name: str
    version: str
    architecture: str = ""
    source: str = ""
    source_version: str = ""
    path: str = ""
    purl: str = ""


class OsRelease(msgspec.Struct, frozen=True, omit_defaults=True):
    """The distribution as its os-release(5) names it: `id` debian, `version` 12, `name` for people."""

    id: str = ""
    version: str = ""
    name: str = ""


def clean_text(text: str) -> str:
    """Return one line of at most `MAX_TEXT` characters, without control and bidirectional characters."""
    return _CONTROL_CHARACTERS.sub("\ufffd", text[: MAX_TEXT + 1].strip())[:MAX_TEXT]


def parse_os_release(content: bytes) -> OsRelease:
    """Parse os-release(5); fields that are absent are empty."""
    fields = {}
    for line in content.decode(errors="replace").splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith("#"):
            fields[name] = clean_text(value.strip().strip("\"'"))
    name = fields.get("PRETTY_NAME") or fields.get("NAME", "")
    return OsRelease(fields.get("ID", ""), fields.get("VERSION_ID", ""), name)


def sort_packages(packages: Iterable[Package]) -> list[Package]:
    """Return the packages without duplicates, by kind and name."""
    key = ("deb", "apk", "rpm", "pypi", "npm", "other").index
    return sorted(
        dict.fromkeys(packages), key=lambda one: (key(one.kind), one.name, one.version, one.path)
    )
