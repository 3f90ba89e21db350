"""Headers of tar archives, of the kinds that an image layout needs: files, directories, long names.

Read strictly: links, devices and sparse files are refused, as is everything that two programs could
read differently. Written so that the same content is the same bytes.
"""

import tarfile
from dataclasses import dataclass
from typing import Literal

from proxy.errors import BundleError

BLOCK = 512
END = bytes(2 * BLOCK)

# No name of a layout is longer, and no extended header needs more.
MAX_NAME = 4096
MAX_EXTENDED = 64 << 10
_MAX_SIZE = 1 << 53

Kind = Literal["file", "directory", "pax", "global", "name"]

_KINDS: dict[bytes, Kind] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.XHDTYPE: "pax",
    tarfile.SOLARIS_XHDTYPE: "pax",
    tarfile.XGLTYPE: "global",
    tarfile.GNUTYPE_LONGNAME: "name",
}
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


@dataclass(frozen=True, slots=True)
class Header:
    """What one header says. `size` bytes follow it, and `padding(size)` zeros."""

    name: str
    size: int
    kind: Kind


def padding(size: int) -> int:
    """Return how many bytes fill the last block of `size` bytes."""
    return -size % BLOCK


def write_header(name: str, size: int) -> bytes:
    """Return the header of a file: of nobody, of 1970, with extensions only where they are needed."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def parse_header(block: bytes) -> Header | None:
    """Return what the block says, None if it is of zeros: the end. Raises `BundleError`."""
    try:
        entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # not in the stubs
        return None
    except (tarfile.HeaderError, ValueError) as error:
        raise BundleError("not a tar archive, or damaged: a header is wrong") from error
    kind = _KINDS.get(entry.type)
    if kind is None:
        what = _REFUSED.get(entry.type, "of an unknown kind")
        raise BundleError(f"{entry.name[:80]!r} is {what}, which no image layout holds")
    _check_size(entry.size)
    if kind == "directory" and entry.size:
        raise BundleError(f"{entry.name[:80]!r} is a directory with content")
    limits = {"pax": MAX_EXTENDED, "global": MAX_EXTENDED, "name": MAX_NAME}
    if entry.size > limits.get(kind, _MAX_SIZE):
        raise BundleError(f"an extended header has {entry.size} bytes")
    return Header(entry.name, entry.size, kind)


def parse_name(content: bytes) -> str:
    """Return the name in GNU's header for long names. Raises `BundleError`."""
    try:
        return content.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise BundleError("a name is not UTF-8") from error


def parse_pax(content: bytes) -> dict[str, str]:
    """Return `path` and `size` of an extended header (POSIX pax, "Extended Header").

    Other records change nothing of what we take, but for those of sparse files. Raises `BundleError`.
    """
    found = {}
    while content:
        digits, _, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record, content = content[:length], content[length:]
        if len(record) != length or not record.endswith(b"\n"):
            raise BundleError("an extended header is damaged")
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or key.startswith(b"GNU.sparse"):
            raise BundleError(f"an extended header has {key[:80]!r}")
        if key in (b"path", b"size"):
            found[key.decode()] = parse_name(value)
    return found


def parse_size(text: str) -> int:
    """Return the size in an extended header. Raises `BundleError`."""
    size = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    if not 0 <= size <= _MAX_SIZE:
        raise BundleError(f"an entry has an impossible size: {size}")
