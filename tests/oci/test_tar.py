"""Tar headers: strict to parse, and compatible with the standard library."""

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from proxy.errors import BundleError
from proxy.oci import tar

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=200)


@given(NAMES, st.integers(0, 1 << 50))
def test_the_standard_library_parses_an_encoded_header(name, size):
    content = tar.encode_header(name, size)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        entry = archive.next()
    assert entry is not None
    assert (entry.name, entry.size, entry.mode, entry.mtime) == (name, size, 0o644, 0)


@given(st.from_regex(r"blobs/sha256/[0-9a-f]{64}", fullmatch=True), st.integers(0, (8 << 30) - 1))
def test_an_encoded_header_round_trips(name, size):
    header = tar.parse_header(tar.encode_header(name, size))
    assert header == tar.TarHeader(name, size, "file")


def test_a_blob_needs_one_block_and_the_longest_name_three():
    assert len(tar.encode_header(f"blobs/sha256/{'0' * 64}", (8 << 30) - 1)) == tar.BLOCK_SIZE
    assert len(tar.encode_header(f"blobs/sha512/{'0' * 128}", 1)) == 3 * tar.BLOCK_SIZE


def test_a_block_of_zeros_is_the_end():
    assert tar.parse_header(bytes(512)) is None


@given(st.binary(min_size=512, max_size=512))
def test_an_arbitrary_block_raises_no_other_error(block):
    try:
        header = tar.parse_header(block)
    except BundleError:
        return
    assert header is None or header.size >= 0


def entry(type_flag: bytes = tarfile.REGTYPE, size: int = 0, name: str = "name") -> bytes:
    made = tarfile.TarInfo(name)
    made.type = type_flag
    made.size = size
    return made.tobuf(tarfile.GNU_FORMAT)[:512]


@pytest.mark.parametrize(
    ("type_flag", "kind"),
    [
        (tarfile.REGTYPE, "file"),
        (tarfile.AREGTYPE, "file"),
        (tarfile.DIRTYPE, "directory"),
        (tarfile.XHDTYPE, "pax"),
        (tarfile.XGLTYPE, "global"),
        (tarfile.GNUTYPE_LONGNAME, "name"),
    ],
)
def test_the_kinds_of_entries_that_are_accepted(type_flag, kind):
    header = tar.parse_header(entry(type_flag))
    assert header
    assert header.kind == kind


@pytest.mark.parametrize(
    ("type_flag", "size"),
    [
        (tarfile.SYMTYPE, 0),
        (tarfile.CONTTYPE, 0),
        (tarfile.DIRTYPE, 1),
        (tarfile.XHDTYPE, tar.MAX_EXTENDED_HEADER_SIZE + 1),
        (tarfile.GNUTYPE_LONGNAME, tar.MAX_NAME_SIZE + 1),
        (tarfile.REGTYPE, 1 << 60),
    ],
)
def test_other_kinds_and_invalid_sizes_are_rejected(type_flag, size):
    with pytest.raises(BundleError):
        tar.parse_header(entry(type_flag, size))


def test_a_damaged_header_is_rejected():
    block = bytearray(entry())
    block[0] ^= 1
    with pytest.raises(BundleError, match="damaged"):
        tar.parse_header(bytes(block))


def test_a_name_that_is_not_utf_8_is_rejected():
    assert tar.parse_long_name(b"a name\0\0") == "a name"
    with pytest.raises(BundleError):
        tar.parse_long_name(b"\xff")


def test_names_and_sizes_are_read_from_extended_headers():
    records = b"13 path=name\n12 size=123\n20 comment=whatever\n"
    assert tar.parse_pax_records(records) == {"path": "name", "size": "123"}
    assert tar.parse_pax_size("123") == 123


@pytest.mark.parametrize(
    "content",
    [b"x", b"5 a=b", b"99 path=name\n", b"7 path\n", b"23 GNU.sparse.realsize=1\n", b"0 a=b\n"],
)
def test_damaged_extended_headers_and_sparse_files_are_rejected(content):
    with pytest.raises(BundleError):
        tar.parse_pax_records(content)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x", "9" * 19, "9" * 40, "\u0661"])
def test_an_invalid_size_in_an_extended_header_is_rejected(text):
    with pytest.raises(BundleError):
        tar.parse_pax_size(text)


@given(st.binary(max_size=300))
def test_an_arbitrary_extended_header_raises_no_other_error(content):
    with suppress(BundleError):
        tar.parse_pax_records(content)


@given(st.integers(0, 1 << 40))
def test_padding_fills_the_last_block(size):
    assert (size + tar.padding_size(size)) % tar.BLOCK_SIZE == 0
    assert tar.padding_size(size) < tar.BLOCK_SIZE
