"""The databases of dpkg, apk, Python and Node in a file system. Pure; what cannot be read is left out."""

import re
from collections.abc import Iterator
from itertools import islice

import msgspec

from proxy.contents.packages import Package, clean_text

# Packages of one database; the largest distributions have 70,000.
MAX_DATABASE_PACKAGES = 100_000

_SOURCE = re.compile(r"(\S+)(?:\s+\(([^)]+)\))?")
_INSTALLED_STATES = frozenset(
    {"installed", "unpacked", "half-configured", "triggers-awaited", "triggers-pending"}
)


def parse_dpkg_status(content: bytes, path: str) -> list[Package]:
    """Parse dpkg's status, or a file of distroless' `status.d`: the packages that are installed."""
    return list(islice(_iter_dpkg(content, path), MAX_DATABASE_PACKAGES))


def _iter_dpkg(content: bytes, path: str) -> Iterator[Package]:
    for fields in _paragraphs(content, {"Package", "Version", "Architecture", "Source", "Status"}):
        state = fields.get("Status", "installed").split()  # status.d has none
        name, version = fields.get("Package", ""), fields.get("Version", "")
        if not name or not version or not state or state[-1] not in _INSTALLED_STATES:
            continue
        match = _SOURCE.match(fields.get("Source", ""))
        source, source_version = match.groups(default="") if match else ("", "")
        yield Package(
            "deb",
            name,
            version,
            fields.get("Architecture", ""),
            "" if source == name else source,
            "" if source_version == version else source_version,
            path,
        )


def _paragraphs(content: bytes, wanted: set[str]) -> Iterator[dict[str, str]]:
    """Yield the wanted fields of each paragraph of a control file (deb822(5)), first lines only."""
    fields: dict[str, str] = {}
    for line in content.decode(errors="replace").split("\n"):
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            if name in wanted:
                fields[name] = clean_text(value)
    if fields:
        yield fields


def parse_apk_installed(content: bytes, path: str) -> list[Package]:
    """Parse apk's database of installed packages (apk-v2 format: `P:` name, `V:` version, `o:` origin)."""
    return list(islice(_iter_apk(content, path), MAX_DATABASE_PACKAGES))


def _iter_apk(content: bytes, path: str) -> Iterator[Package]:
    fields: dict[str, str] = {}
    for line in (*content.decode(errors="replace").split("\n"), ""):
        if line[1:2] == ":" and line[0] in "PVAo":
            fields.setdefault(line[0], clean_text(line[2:]))
        elif not line.strip():
            name, version = fields.get("P", ""), fields.get("V", "")
            if name and version:
                source = fields.get("o", "")
                yield Package(
                    "apk",
                    name,
                    version,
                    fields.get("A", ""),
                    "" if source == name else source,
                    path=path,
                )
            fields = {}


def parse_python_metadata(content: bytes, path: str) -> list[Package]:
    """Parse a distribution's METADATA or PKG-INFO (core metadata specification): its head is enough."""
    fields: dict[str, str] = {}
    for line in content.decode(errors="replace").splitlines():
        if not line.strip():
            break  # the description follows
        name, colon, value = line.partition(":")
        if colon and name.lower() in ("name", "version"):
            fields.setdefault(name.lower(), clean_text(value))
    if not fields.get("name") or not fields.get("version"):
        return []
    return [Package("pypi", normalize_python_name(fields["name"]), fields["version"], path=path)]


def normalize_python_name(name: str) -> str:
    """Return the name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class _NodePackage(msgspec.Struct):
    name: str
    version: str


_DECODE_NODE_PACKAGE = msgspec.json.Decoder(_NodePackage)


def parse_node_package(content: bytes, path: str) -> list[Package]:
    """Parse a package.json."""
    try:
        found = _DECODE_NODE_PACKAGE.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    name, version = clean_text(found.name), clean_text(found.version)
    return [Package("npm", name, version, path=path)] if name and version else []
