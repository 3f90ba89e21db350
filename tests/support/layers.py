"""Layers of images, made by Python's tarfile."""

import gzip
import io
import sqlite3
import struct
import tarfile
from collections.abc import Mapping

from backports import zstd

from proxy.contents.layers.layer import read_layer
from proxy.contents.layers.layer_contents import LayerContents

DPKG_STATUS = b"""\
Package: openssl
Status: install ok installed
Architecture: amd64
Version: 3.0.14-1~deb12u2
Description: Secure Sockets Layer toolkit
 openssl (3.0) in a continued line
 .

Package: libssl3
Status: install ok installed
Architecture: amd64
Source: openssl
Version: 3.0.14-1~deb12u2

Package: gone
Status: deinstall ok config-files
Version: 1.0

Package: libc-bin
Status: install ok half-configured
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+deb12u8
"""

APK_INSTALLED = b"""\
C:Q1abc=
P:libssl3
V:3.3.2-r1
A:x86_64
o:openssl
F:lib
R:libssl.so.3

P:musl
V:1.2.5-r0
A:x86_64
o:musl
"""

OS_RELEASE = b'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n# x=y\n'


def make_tar(
    files: Mapping[str, bytes | tarfile.TarInfo | None], format_: int = tarfile.PAX_FORMAT
) -> bytes:
    """Return a tar archive; None as content makes a directory, a `TarInfo` is added as it is."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for name, content in files.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name = name
            if content is None:
                entry.type = tarfile.DIRTYPE
            data = content if isinstance(content, bytes) else b""
            entry.size = len(data) or entry.size
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def make_layer(files: Mapping[str, bytes | tarfile.TarInfo | None]) -> bytes:
    """Return a layer that is compressed by gzip."""
    return gzip.compress(make_tar(files), mtime=0)


def compress_zstd(content: bytes) -> bytes:
    """Return content that is compressed by zstd."""
    return zstd.compress(content)


def link_to(target: str, *, is_hard: bool = False) -> tarfile.TarInfo:
    """Return an entry that is a link."""
    entry = tarfile.TarInfo()
    entry.type = tarfile.LNKTYPE if is_hard else tarfile.SYMTYPE
    entry.linkname = target
    return entry


def read_files(files: Mapping[str, bytes | tarfile.TarInfo | None]) -> LayerContents:
    """Return what a layer of these files has."""
    return read_layer(io.BytesIO(make_tar(files)))


def make_rpm_header(fields: Mapping[int, str | int]) -> bytes:
    """Return a header as rpm's database has it: texts, and numbers of 32 bits, by tag."""
    index, data = b"", b""
    for tag, value in sorted(fields.items()):
        if isinstance(value, int):
            data += bytes(-len(data) % 4)
            index += struct.pack(">IIII", tag, 4, len(data), 1)
            data += struct.pack(">I", value)
        else:
            index += struct.pack(">IIII", tag, 6, len(data), 1)
            data += value.encode() + b"\0"
    return struct.pack(">II", len(fields), len(data)) + index + data


def make_rpm_database(*headers: bytes | str, schema: str = "") -> bytes:
    """Return an `rpmdb.sqlite` with the table that rpm creates."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(
        schema
        or "CREATE TABLE 'Packages' (hnum INTEGER PRIMARY KEY AUTOINCREMENT,blob BLOB NOT NULL)"
    )
    for header in headers:
        connection.execute("INSERT INTO Packages (blob) VALUES (?)", (header,))
    connection.commit()
    content: bytes = connection.serialize()
    connection.close()
    return content[:18] + b"\2\2" + content[20:]  # rpm uses a write-ahead log
