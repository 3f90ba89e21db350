"""Header blobs of rpm's database (rpm's "Package format" manual, "Header Structure"). Pure.

A blob of the database has no magic: the numbers of index entries and of bytes of data, the entries of 16
bytes each, and the data.
"""

import struct
from collections.abc import Mapping

from proxy.contents.packages import Package, clean_text

# rpm's own limits (lib/header.c: headerVerifyInfo).
MAX_HEADER_ENTRIES = 0xFFFF
_MAX_TAG_TEXT = 4096

_COUNTS = struct.Struct(">II")
_ENTRY = struct.Struct(">IIII")
_INT32 = struct.Struct(">I")
_NAME, _VERSION, _RELEASE, _EPOCH, _ARCHITECTURE, _SOURCE_RPM = 1000, 1001, 1002, 1003, 1022, 1044
_TEXT_TAGS = frozenset({_NAME, _VERSION, _RELEASE, _ARCHITECTURE, _SOURCE_RPM})
_INT32_TYPE, _TEXT_TYPES = 4, (6, 9)  # 6 is a string, 9 a translated one
# Keys of signatures, which rpm keeps as packages.
_NOT_PACKAGES = frozenset({"gpg-pubkey"})


def parse_rpm_header(blob: bytes, path: str) -> Package | None:
    """Return the package of a header blob; None if it is damaged, or the key of a signature."""
    tags = _read_tags(blob)
    name, version = tags.get(_NAME, ""), tags.get(_VERSION, "")
    if not name or not version or name in _NOT_PACKAGES:
        return None
    release, epoch = tags.get(_RELEASE, ""), tags.get(_EPOCH, "")
    full_version = f"{version}-{release}" if release else version
    source, source_version = split_source_rpm(tags.get(_SOURCE_RPM, ""))
    return Package(
        "rpm",
        name,
        f"{epoch}:{full_version}" if epoch not in ("", "0") else full_version,
        tags.get(_ARCHITECTURE, ""),
        "" if source == name else source,
        "" if source_version == full_version else source_version,
        path,
    )


def _read_tags(blob: bytes) -> Mapping[int, str]:
    if len(blob) < _COUNTS.size:
        return {}
    count, size = _COUNTS.unpack_from(blob)
    start = _COUNTS.size + count * _ENTRY.size
    if count > MAX_HEADER_ENTRIES or start + size > len(blob):
        return {}
    tags = {}
    for tag, kind, offset, _ in _ENTRY.iter_unpack(blob[_COUNTS.size : start]):
        position = start + offset
        if offset >= size:
            continue
        if tag in _TEXT_TAGS and kind in _TEXT_TYPES:
            text, _, _ = blob[position : min(position + _MAX_TAG_TEXT, start + size)].partition(
                b"\0"
            )
            tags[tag] = clean_text(text.decode(errors="replace"))
        elif tag == _EPOCH and kind == _INT32_TYPE and offset + _INT32.size <= size:
            tags[tag] = str(_INT32.unpack_from(blob, position)[0])
    return tags


def split_source_rpm(text: str) -> tuple[str, str]:
    """Return name and version of a source package: openssl-3.0.7-27.el9.src.rpm."""
    stem = text.removesuffix(".rpm").rpartition(".")[0]
    name, _, release = stem.rpartition("-")
    name, _, version = name.rpartition("-")
    return (name, f"{version}-{release}") if name else ("", "")
