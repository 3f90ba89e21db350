"""Row M15: a damaged or malicious bundle is rejected, and the store stays as it was."""

import gzip
import io
import json
import os
import struct
import tarfile
import threading
from collections.abc import Callable

import pytest
from backports import zstd

from proxy.errors import BundleError, DigestMismatchError, NoSpaceError, ProxyError
from proxy.oci import layout as layout_module
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.support.bundles import (
    APP_FULL_NAME,
    LayoutBuilder,
    blob_path,
    build_layout,
    import_bundle,
    make_tar,
)
from tests.support.program import Program

MIB = 1 << 20


@pytest.fixture
async def program_with_image(program):
    """A program whose store has one image, which no import may touch."""
    layout, _ = build_layout(b"resident", name=f"{APP_FULL_NAME}:resident")
    await import_bundle(program, layout.to_tar())
    return program


async def assert_rejected(
    program: Program, bundle: bytes, error: type[ProxyError] = BundleError, message: str = ""
) -> None:
    """Check that a bundle is rejected and changes nothing, in the store or beside it."""
    before = store_state(program)
    outside = sorted(program.root.parent.iterdir())
    with pytest.raises(error, match=message or None) as raised:
        await import_bundle(program, bundle)
    assert 0 < len(str(raised.value)) <= 250
    assert store_state(program) == before
    assert sorted(program.root.parent.iterdir()) == outside
    assert (await program.manifest("library/app", "1")).status == 404
    assert (await program.manifest("library/app", "resident")).status == 200


def store_state(program: Program) -> tuple[set[str], list[str]]:
    """Return the stored digests and the names in the ingest directory."""
    return program.stored(), sorted(path.name for path in (program.root / "ingest").iterdir())


def tar_with_entries(
    layout: LayoutBuilder, *entries: tarfile.TarInfo, content: bytes = b""
) -> bytes:
    """Return the tar of a layout with additional entries before its own."""
    index = json.dumps({"schemaVersion": 2, "manifests": layout.images}).encode()
    own = [(tarfile.TarInfo(name), data) for name, data in layout.files.items()]
    own.append((tarfile.TarInfo("index.json"), index))
    return make_tar([*((entry, content) for entry in entries), *own])


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.linkname = linkname
    return entry


@pytest.mark.parametrize("name", ["../evil", "blobs/../../evil", "/etc/evil", "a/../b"])
async def test_a_name_that_leads_out_of_the_archive_is_rejected(program_with_image, name):
    await assert_rejected(
        program_with_image,
        tar_with_entries(build_layout()[0], tar_entry(name), content=b"evil"),
        message="leads out",
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Q", "unknown type"),
    ],
)
async def test_an_entry_that_is_not_a_file_is_rejected(program_with_image, kind, message):
    odd = tar_entry(blob_path(digest_of(b"x")), kind, "/etc/passwd")
    await assert_rejected(
        program_with_image, tar_with_entries(build_layout()[0], odd), message=message
    )


async def test_a_duplicate_blob_is_rejected(program_with_image):
    layout, _ = build_layout(b"twice")
    again = tar_entry(blob_path(digest_of(b"twice")))
    await assert_rejected(
        program_with_image, tar_with_entries(layout, again, content=b"twice"), message="twice"
    )


@pytest.mark.parametrize("name", ["index.json", "oci-layout"])
async def test_a_duplicate_document_is_rejected(program_with_image, name):
    content = b'{"imageLayoutVersion": "1.0.0", "manifests": []}'
    await assert_rejected(
        program_with_image,
        tar_with_entries(build_layout()[0], tar_entry(name), content=content),
        message="twice",
    )


async def test_one_flipped_bit_in_a_blob_is_noticed(program_with_image):
    for size in (10, 3 * MIB):
        layout, _ = build_layout(b"z" * size)
        bundle = layout.to_tar()
        changed = flip(bundle, bundle.index(b"z" * 10) + size // 2)
        await assert_rejected(
            program_with_image, changed, DigestMismatchError, message=digest_of(b"z" * size)
        )


async def test_a_truncated_bundle_is_rejected(program_with_image):
    layout, _ = build_layout(b"z" * 5000)
    bundle = layout.to_tar().rstrip(b"\0")
    for length in (0, 1, 511, 512, 513, 3000, len(bundle) // 2, len(bundle)):
        await assert_rejected(program_with_image, bundle[:length], ProxyError)


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_truncated_or_damaged_compressed_bundle_is_rejected(program_with_image, pack):
    layout, _ = build_layout(os.urandom(2 * MIB))
    bundle = pack(layout.to_tar())
    await assert_rejected(program_with_image, bundle[: len(bundle) // 2], message="truncated")
    await assert_rejected(program_with_image, bundle[:-3], message="truncated")
    await assert_rejected(program_with_image, flip(bundle, len(bundle) // 2), ProxyError)
    await assert_rejected(program_with_image, bundle + b"something else", ProxyError)


async def test_parts_in_the_wrong_order_are_rejected(program_with_image):
    layout, _ = build_layout(os.urandom(2 * MIB))
    bundle = layout.to_tar()
    parts = [bundle[at : at + 700_000] for at in range(0, len(bundle), 700_000)]
    await assert_rejected(program_with_image, parts[1] + parts[0] + b"".join(parts[2:]))
    await assert_rejected(program_with_image, parts[0] + b"".join(parts[2:]), ProxyError)
    await assert_rejected(
        program_with_image, bundle + parts[-1], message="unexpected data after the end"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("index.json", b"[]"),
        ("index.json", b"{"),
        ("index.json", b"[" * 100_000),
        ("index.json", b'{"manifests": []}'),
        ("index.json", b'{"manifests": [{"mediaType": "x", "digest": "sha256:ab", "size": 1}]}'),
        ("index.json", b'{"manifests": [{"mediaType": "x", "digest": "", "size": -1}]}'),
        ("index.json", b" " * (9 << 20)),
        ("oci-layout", b'{"imageLayoutVersion": "2.0.0"}'),
        ("manifest.json", b'{"not": "a list"}'),
    ],
    ids=range(9),
)
async def test_invalid_documents_are_rejected(program_with_image, name, content):
    layout, _ = build_layout()
    layout.files[name] = content
    await assert_rejected(program_with_image, layout.to_tar())


async def test_the_old_format_of_docker_save_is_rejected_with_a_hint(program_with_image):
    old = make_tar({"abc/layer.tar": b"x", "abc/json": b"{}", "manifest.json": b"[]"})
    await assert_rejected(program_with_image, old, message="skopeo copy")
    await assert_rejected(
        program_with_image, make_tar({"abc/layer.tar": bytes(65 << 20)}), message="skopeo copy"
    )


async def test_unknown_files_are_skipped_up_to_a_limit(program_with_image):
    layout, _ = build_layout()
    await assert_rejected(
        program_with_image,
        tar_with_entries(layout, tar_entry("extra"), content=bytes(65 << 20)),
        message="layout",
    )
    await import_bundle(
        program_with_image, tar_with_entries(layout, tar_entry("extra"), content=bytes(1 << 20))
    )


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_decompression_bomb_is_rejected(make_program, tmp_path, pack):
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    blob = bytes(100 * MIB)
    with pytest.raises(NoSpaceError, match="max_size"):
        await import_bundle(program, pack(make_tar({blob_path(digest_of(blob)): blob})))
    with pytest.raises(BundleError):
        await import_bundle(program, pack(make_tar({"zeros": blob})))
    with pytest.raises(BundleError, match="unexpected data after the end"):
        await import_bundle(program, pack(blob))
    assert program.disk_usage() < 2_000_000


async def test_a_blob_that_claims_a_petabyte_is_rejected_at_once(program_with_image):
    huge = tarfile.TarInfo(blob_path(digest_of(b"x")))
    huge.size = 1 << 50
    await assert_rejected(
        program_with_image, huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 10_000, NoSpaceError
    )


@pytest.mark.parametrize("size", [-1, 1 << 62])
async def test_an_impossible_size_is_rejected(program_with_image, size):
    block = bytearray(tarfile.TarInfo("blobs/x").tobuf())
    block[124:136] = (
        b"\xff" * 4 + struct.pack(">q", size)
        if size < 0
        else (b"\x80" + bytes(3) + struct.pack(">q", size))
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    await assert_rejected(program_with_image, bytes(block), message="invalid size")


async def test_a_bundle_larger_than_the_store_fails_and_leaves_nothing_behind(
    make_program, tmp_path
):
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    small, _ = build_layout(b"resident" * MIB, name=f"{APP_FULL_NAME}:resident")
    await import_bundle(program, small.to_tar())
    layout, _ = build_layout(*(bytes([n]) * 6 * MIB for n in range(4)))
    with pytest.raises(NoSpaceError, match="max_size"):
        await import_bundle(program, layout.to_tar())
    assert program.disk_usage() <= 20_000_000
    assert not list((program.root / "ingest").iterdir())
    # The blobs of the bundle were removed; what was evicted for them is not restored.
    assert program.stored() <= {digest_of(data) for data in small.files.values()}


async def test_a_manifest_that_states_a_wrong_size_is_rejected(program_with_image):
    layout = LayoutBuilder()
    described = layout.add_manifest(b"layer")
    document = json.loads(layout.files.pop(blob_path(described["digest"])))
    document["layers"][0]["size"] = 4
    layout.list_image(layout.add_blob(document, described["mediaType"]), name=f"{APP_FULL_NAME}:1")
    (image,) = (await import_bundle(program_with_image, layout.to_tar()))["images"]
    assert "not 4 as its descriptor states" in image["reason"]
    assert (await program_with_image.manifest("library/app", "1")).status == 404
    assert digest_of(b"layer") not in program_with_image.stored()


async def test_an_index_nested_too_deeply_is_rejected(program_with_image):
    layout = LayoutBuilder()
    described = layout.add_manifest(b"layer")
    for _ in range(10):
        described = layout.add_index(described)
    layout.list_image(described, name=f"{APP_FULL_NAME}:1")
    (image,) = (await import_bundle(program_with_image, layout.to_tar()))["images"]
    assert "nested" in image["reason"]
    assert (await program_with_image.manifest("library/app", "1")).status == 404


async def test_a_blob_whose_stored_size_differs_is_rejected(program_with_image):
    stored = blob_path(digest_of(b"resident"))
    await assert_rejected(
        program_with_image,
        tar_with_entries(build_layout()[0], tar_entry(stored), content=b"residents"),
        message="bytes",
    )


async def test_malicious_extended_headers_are_rejected(program_with_image):
    for records in (
        {"path": "../evil"},
        {"size": "-1"},
        {"size": "9" * 30},
        {"GNU.sparse.major": "1"},
        {"comment": "x" * 100_000},
    ):
        odd = tar_entry("harmless")
        odd.pax_headers = records
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(odd, io.BytesIO())
        await assert_rejected(
            program_with_image, buffer.getvalue() + tar_with_entries(build_layout()[0])
        )


async def test_an_import_does_not_write_through_a_symlink_in_the_store(
    program_with_image, tmp_path
):
    layout, _ = build_layout(b"elsewhere")
    digest = digest_of(b"elsewhere")
    (program_with_image.root / blob_path(digest)).symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    await import_bundle(program_with_image, layout.to_tar())
    assert sorted(tmp_path.iterdir()) == before
    assert (await program_with_image.blob(digest)).digest == digest


async def test_m15_blobs_that_no_image_uses_are_removed(program):
    layout, _ = build_layout(b"named")
    layout.add_blob(b"unused")
    report = await import_bundle(program, layout.to_tar())
    assert report["added"] == 3
    assert digest_of(b"unused") not in program.stored()


async def test_m15_a_sparse_terabyte_is_rejected_before_it_uses_space(program):
    header = tarfile.TarInfo(blob_path(digest_of(b"x")))
    header.size = 1 << 40
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    before = program.disk_usage()
    with pytest.raises(BundleError):
        await import_bundle(program, header.tobuf(tarfile.PAX_FORMAT) + bytes(1 * MIB))
    assert program.disk_usage() - before < MIB


EMPTY_STREAMS: dict[str, bytes] = {"zstd": zstd.compress(b""), "gzip": gzip.compress(b"")}
PACK: dict[str, Callable[[bytes], bytes]] = {"zstd": zstd.compress, "gzip": gzip.compress}


@pytest.mark.parametrize("kind", ["zstd", "gzip"])
async def test_l02_a_bundle_of_very_many_empty_streams_is_rejected(program_with_image, kind):
    bundle = PACK[kind](build_layout()[0].to_tar())
    bomb = EMPTY_STREAMS[kind] * 1_000_000
    await assert_rejected(program_with_image, bomb + bundle, message="streams with little")
    await assert_rejected(program_with_image, bundle + bomb, message="streams with little")


@pytest.mark.parametrize("kind", ["zstd", "gzip"])
async def test_a_bundle_may_be_compressed_block_by_block(program_with_image, kind):
    tar = build_layout(os.urandom(12 * MIB))[0].to_tar()
    blocks = [PACK[kind](tar[start : start + 8192]) for start in range(0, len(tar), 8192)]
    assert len(blocks) > 1000
    await import_bundle(program_with_image, b"".join(blocks) + EMPTY_STREAMS[kind])
    assert (await program_with_image.manifest("library/app", "1")).status == 200


def many_entries(name: str, kind: bytes, count: int, content: bytes = b"") -> bytes:
    """Return the first part of an archive: that many equal entries."""
    entry = tar_entry(name, kind)
    entry.size = len(content)
    return (entry.tobuf() + content + bytes(-len(content) % 512)) * count


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (many_entries("d", tarfile.DIRTYPE, 10_001), "10000 directories"),
        (many_entries("x", tarfile.REGTYPE, 20_000), "not an OCI image layout"),
        (
            (
                many_entries("h", tarfile.XHDTYPE, 1, b"65535 comment=" + b"x" * 65520 + b"\n")
                + many_entries("x", tarfile.REGTYPE, 1)
            )
            * 1100,
            "bytes of extended headers",
        ),
        (many_entries("h", tarfile.XHDTYPE, 1, b"5 a=\n" * 1001), "1000 records"),
    ],
    ids=["directories", "empty files", "extended headers", "records"],
)
async def test_l02_headers_without_content_are_bounded(program_with_image, prefix, message):
    bundle = zstd.compress(prefix + build_layout()[0].to_tar())
    assert len(bundle) < 2 * MIB
    await assert_rejected(program_with_image, bundle, message=message)


async def test_l02_documents_of_a_bundle_are_parsed_off_the_loop(program, monkeypatch):
    parsed_in: set[str] = set()
    parse = layout_module.parse_index

    def parse_and_record(content: bytes) -> list[layout_module.LayoutImage]:
        parsed_in.add(threading.current_thread().name)
        return parse(content)

    monkeypatch.setattr(layout_module, "parse_index", parse_and_record)
    await import_bundle(program, build_layout()[0].to_tar())
    assert parsed_in
    assert threading.main_thread().name not in parsed_in
