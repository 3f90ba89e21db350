"""Headers of tar archives, of the kinds that an image layout needs: files, directories, long names.

Parsing is strict: links, devices, sparse files and everything that two programs could read
differently are rejected. Writing is reproducible: the same content results in the same bytes.
"""

import tarfile
from dataclasses import dataclass
from typing import Literal

from proxy.errors import BundleError

BLOCK_SIZE = 512
END_OF_ARCHIVE = bytes(2 * BLOCK_SIZE)

# More than any name or extended header of an image layout needs.
MAX_NAME_SIZE = 4096
MAX_EXTENDED_HEADER_SIZE = 64 << 10
# Records of an extended header; the usual ones are a name, a size and some times.
MAX_PAX_RECORDS = 1000
_MAX_SIZE = 1 << 53

EntryKind = Literal["file", "directory", "pax", "global", "name"]

_ENTRY_KINDS: dict[bytes, EntryKind] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.XHDTYPE: "pax",
    tarfile.SOLARIS_XHDTYPE: "pax",
    tarfile.XGLTYPE: "global",
    tarfile.GNUTYPE_LONGNAME: "name",
}
_REJECTED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


@dataclass(frozen=True, slots=True)
class TarHeader:
    """A header. `size` bytes of content follow it, then `padding_size(size)` zeros."""

    name: str
    size: int
    kind: EntryKind


def padding_size(size: int) -> int:
    """Return the number of bytes that pad content of `size` bytes to full blocks."""
    return -size % BLOCK_SIZE


def encode_header(name: str, size: int) -> bytes:
    """Return the header of a file, without owner or time; extended headers only if needed."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def parse_header(block: bytes) -> TarHeader | None:
    """Parse a header; return None for a block of zeros, the end. Raises `BundleError`."""
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # not in the stubs
        return None
    except (tarfile.HeaderError, ValueError) as error:
        raise BundleError("not a tar archive or damaged: invalid header") from error
    kind = _ENTRY_KINDS.get(entry.type)
    if kind is None:
        what = _REJECTED_TYPES.get(entry.type, "of an unknown type")
        raise BundleError(f"{entry.name[:80]!r} is {what}, which is not allowed in an image layout")
    _check_size(entry.size)
    if kind == "directory" and entry.size:
        raise BundleError(f"{entry.name[:80]!r} is a directory with a size other than 0")
    limits = {
        "pax": MAX_EXTENDED_HEADER_SIZE,
        "global": MAX_EXTENDED_HEADER_SIZE,
        "name": MAX_NAME_SIZE,
    }
    if entry.size > limits.get(kind, _MAX_SIZE):
        raise BundleError(f"an extended header is too large: {entry.size} bytes")
    return TarHeader(entry.name, entry.size, kind)


def parse_long_name(content: bytes) -> str:
    """Return the name from a GNU long name header. Raises `BundleError`."""
    try:
        return content.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise BundleError("a file name is not UTF-8") from error


def parse_pax_records(content: bytes) -> dict[str, str]:
    """Return the records `path` and `size` of an extended header (POSIX pax, "Extended Header").

    Ignores other records, but rejects those of sparse files. Raises `BundleError`.
    """
    records = {}
    offset = count = 0
    while offset < len(content):
        count += 1
        if count > MAX_PAX_RECORDS:
            raise BundleError(f"an extended header has more than {MAX_PAX_RECORDS} records")
        digits, _, _ = content[offset : offset + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[offset : offset + length]
        offset += length
        if len(record) != length or not record.endswith(b"\n"):
            raise BundleError("an extended header is damaged")
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or key.startswith(b"GNU.sparse"):
            raise BundleError(f"an extended header has an unsupported record {key[:80]!r}")
        if key in (b"path", b"size"):
            records[key.decode()] = parse_long_name(value)
    return records


def parse_pax_size(text: str) -> int:
    """Return the size from a record of an extended header. Raises `BundleError`."""
    size = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    if not 0 <= size <= _MAX_SIZE:
        raise BundleError(f"an entry has an invalid size: {size}")
