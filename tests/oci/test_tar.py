import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from proxy.errors import BundleError
from proxy.oci import tar

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=200)


@given(NAMES, st.integers(0, 1 << 50))
def test_what_is_written_is_read_by_the_standard_library(name, size):
    content = tar.encode_header(name, size)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        entry = archive.next()
    assert entry is not None
    assert (entry.name, entry.size, entry.mode, entry.mtime) == (name, size, 0o644, 0)


@given(st.from_regex(r"blobs/sha256/[0-9a-f]{64}", fullmatch=True), st.integers(0, (8 << 30) - 1))
def test_what_is_written_is_read(name, size):
    header = tar.parse_header(tar.encode_header(name, size))
    assert header == tar.TarHeader(name, size, "file")


def test_a_blob_needs_one_block_and_the_longest_name_three():
    assert len(tar.encode_header(f"blobs/sha256/{'0' * 64}", (8 << 30) - 1)) == tar.BLOCK_SIZE
    assert len(tar.encode_header(f"blobs/sha512/{'0' * 128}", 1)) == 3 * tar.BLOCK_SIZE


def test_a_block_of_zeros_is_the_end():
    assert tar.parse_header(bytes(512)) is None


@given(st.binary(min_size=512, max_size=512))
def test_no_block_does_worse_than_being_refused(block):
    try:
        header = tar.parse_header(block)
    except BundleError:
        return
    assert header is None or header.size >= 0


def entry(kind: bytes = tarfile.REGTYPE, size: int = 0, name: str = "name") -> bytes:
    made = tarfile.TarInfo(name)
    made.type = kind
    made.size = size
    return made.tobuf(tarfile.GNU_FORMAT)[:512]


@pytest.mark.parametrize(
    ("kind", "meant"),
    [
        (tarfile.REGTYPE, "file"),
        (tarfile.AREGTYPE, "file"),
        (tarfile.DIRTYPE, "directory"),
        (tarfile.XHDTYPE, "pax"),
        (tarfile.XGLTYPE, "global"),
        (tarfile.GNUTYPE_LONGNAME, "name"),
    ],
)
def test_kinds_that_are_taken(kind, meant):
    header = tar.parse_header(entry(kind))
    assert header
    assert header.kind == meant


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (tarfile.SYMTYPE, 0),
        (tarfile.CONTTYPE, 0),
        (tarfile.DIRTYPE, 1),
        (tarfile.XHDTYPE, tar.MAX_EXTENDED_HEADER_SIZE + 1),
        (tarfile.GNUTYPE_LONGNAME, tar.MAX_NAME_SIZE + 1),
        (tarfile.REGTYPE, 1 << 60),
    ],
)
def test_kinds_and_sizes_that_are_refused(kind, size):
    with pytest.raises(BundleError):
        tar.parse_header(entry(kind, size))


def test_a_damaged_header_is_refused():
    block = bytearray(entry())
    block[0] ^= 1
    with pytest.raises(BundleError, match="damaged"):
        tar.parse_header(bytes(block))


def test_a_name_that_is_no_text_is_refused():
    assert tar.parse_long_name(b"a name\0\0") == "a name"
    with pytest.raises(BundleError):
        tar.parse_long_name(b"\xff")


def test_extended_headers_give_names_and_sizes():
    records = b"13 path=name\n12 size=123\n20 comment=whatever\n"
    assert tar.parse_pax_records(records) == {"path": "name", "size": "123"}
    assert tar.parse_pax_size("123") == 123


@pytest.mark.parametrize(
    "content",
    [b"x", b"5 a=b", b"99 path=name\n", b"7 path\n", b"23 GNU.sparse.realsize=1\n", b"0 a=b\n"],
)
def test_extended_headers_that_are_damaged_or_of_sparse_files_are_refused(content):
    with pytest.raises(BundleError):
        tar.parse_pax_records(content)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "9" * 19, "9" * 40, "\u0661"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(BundleError):
        tar.parse_pax_size(text)


@given(st.binary(max_size=300))
def test_no_extended_header_does_worse_than_being_refused(content):
    with suppress(BundleError):
        tar.parse_pax_records(content)


@given(st.integers(0, 1 << 40))
def test_padding_fills_a_block(size):
    assert (size + tar.padding_size(size)) % tar.BLOCK_SIZE == 0
    assert tar.padding_size(size) < tar.BLOCK_SIZE
