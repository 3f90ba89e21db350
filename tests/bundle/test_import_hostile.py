"""Row M15: a bundle that is damaged, or made to harm, is refused, and the store is what it was."""

import gzip
import io
import json
import os
import struct
import tarfile

import pytest
from backports import zstd

from proxy.errors import BundleError, DigestMismatchError, NoSpaceError, ProxyError
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.support.bundles import APP, Layout, layout, path, take, tar
from tests.support.program import Program

MIB = 1 << 20


@pytest.fixture
async def full(program):
    """A program whose store holds one image, to be left alone."""
    made, _ = layout(b"resident", name=f"{APP}:resident")
    await take(program, made.tar())
    return program


async def refuse(
    program: Program, bundle: bytes, error: type[ProxyError] = BundleError, says: str = ""
) -> None:
    """Check that a bundle is refused and that nothing came of it, inside the store or out."""
    before = state(program)
    outside = sorted(program.root.parent.iterdir())
    with pytest.raises(error, match=says or None) as raised:
        await take(program, bundle)
    assert 0 < len(str(raised.value)) <= 250
    assert state(program) == before
    assert sorted(program.root.parent.iterdir()) == outside
    assert (await program.manifest("library/app", "1")).status == 404
    assert (await program.manifest("library/app", "resident")).status == 200


def state(program: Program) -> tuple[set[str], list[str]]:
    return program.stored(), sorted(path.name for path in (program.root / "ingest").iterdir())


def plus(made: Layout, *entries: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """Return a good bundle with odd entries before its own."""
    index = json.dumps({"schemaVersion": 2, "manifests": made.images}).encode()
    own = [(tarfile.TarInfo(name), data) for name, data in made.files.items()]
    own.append((tarfile.TarInfo("index.json"), index))
    return tar([*((entry, content) for entry in entries), *own])


def entry(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    made.linkname = linkname
    return made


@pytest.mark.parametrize("name", ["../evil", "blobs/../../evil", "/etc/evil", "a/../b"])
async def test_a_name_that_leads_out_is_refused(full, name):
    await refuse(full, plus(layout()[0], entry(name), content=b"evil"), says="leads out")


@pytest.mark.parametrize(
    ("kind", "says"),
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
async def test_what_is_no_file_is_refused(full, kind, says):
    odd = entry(path(digest_of(b"x")), kind, "/etc/passwd")
    await refuse(full, plus(layout()[0], odd), says=says)


async def test_a_blob_that_comes_twice_is_refused(full):
    made, _ = layout(b"twice")
    again = entry(path(digest_of(b"twice")))
    await refuse(full, plus(made, again, content=b"twice"), says="twice")


@pytest.mark.parametrize("name", ["index.json", "oci-layout"])
async def test_a_document_that_comes_twice_is_refused(full, name):
    content = b'{"imageLayoutVersion": "1.0.0", "manifests": []}'
    await refuse(full, plus(layout()[0], entry(name), content=content), says="twice")


async def test_one_bit_of_any_blob_is_noticed(full):
    for size in (10, 3 * MIB):
        made, _ = layout(b"z" * size)
        bundle = made.tar()
        changed = flip(bundle, bundle.index(b"z" * 10) + size // 2)
        await refuse(full, changed, DigestMismatchError, says=digest_of(b"z" * size))


async def test_a_bundle_that_was_cut_anywhere_is_refused(full):
    made, _ = layout(b"z" * 5000)
    bundle = made.tar().rstrip(b"\0")
    for length in (0, 1, 511, 512, 513, 3000, len(bundle) // 2, len(bundle)):
        await refuse(full, bundle[:length], ProxyError)


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_compressed_bundle_that_was_cut_or_changed_is_refused(full, pack):
    made, _ = layout(os.urandom(2 * MIB))
    bundle = pack(made.tar())
    await refuse(full, bundle[: len(bundle) // 2], says="cut")
    await refuse(full, bundle[:-3], says="cut")
    await refuse(full, flip(bundle, len(bundle) // 2), ProxyError)
    await refuse(full, bundle + b"something else", ProxyError)


async def test_parts_in_the_wrong_order_are_refused(full):
    made, _ = layout(os.urandom(2 * MIB))
    bundle = made.tar()
    parts = [bundle[at : at + 700_000] for at in range(0, len(bundle), 700_000)]
    await refuse(full, parts[1] + parts[0] + b"".join(parts[2:]))
    await refuse(full, parts[0] + b"".join(parts[2:]), ProxyError)
    await refuse(full, bundle + parts[-1], says="follows the end")


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
async def test_documents_that_are_none_are_refused(full, name, content):
    made, _ = layout()
    made.files[name] = content
    await refuse(full, made.tar())


async def test_the_old_format_of_docker_save_is_refused_with_what_helps(full):
    old = tar({"abc/layer.tar": b"x", "abc/json": b"{}", "manifest.json": b"[]"})
    await refuse(full, old, says="skopeo copy")
    await refuse(full, tar({"abc/layer.tar": bytes(65 << 20)}), says="skopeo copy")


async def test_what_is_no_part_of_a_layout_is_read_over_up_to_a_bound(full):
    made, _ = layout()
    await refuse(full, plus(made, entry("extra"), content=bytes(65 << 20)), says="layout")
    await take(full, plus(made, entry("extra"), content=bytes(1 << 20)))


@pytest.mark.parametrize("pack", [zstd.compress, gzip.compress], ids=["zstd", "gzip"])
async def test_a_bomb_is_not_unpacked(make_program, tmp_path, pack):
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    blob = bytes(100 * MIB)
    with pytest.raises(NoSpaceError, match="max_size"):
        await take(program, pack(tar({path(digest_of(blob)): blob})))
    with pytest.raises(BundleError):
        await take(program, pack(tar({"zeros": blob})))
    with pytest.raises(BundleError, match="follows the end"):
        await take(program, pack(blob))
    assert program.on_disk() < 2_000_000


async def test_a_blob_that_says_it_has_a_petabyte_is_refused_at_once(full):
    huge = tarfile.TarInfo(path(digest_of(b"x")))
    huge.size = 1 << 50
    await refuse(full, huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 10_000, NoSpaceError)


@pytest.mark.parametrize("size", [-1, 1 << 62])
async def test_a_size_that_no_file_has_is_refused(full, size):
    block = bytearray(tarfile.TarInfo("blobs/x").tobuf())
    block[124:136] = (
        b"\xff" * 4 + struct.pack(">q", size)
        if size < 0
        else (b"\x80" + bytes(3) + struct.pack(">q", size))
    )
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    await refuse(full, bytes(block), says="invalid size")


async def test_a_store_that_is_too_small_says_so_and_keeps_what_it_has(make_program, tmp_path):
    program = await make_program(tmp_path / "small", store={"max_size": "20MB"})
    small, _ = layout(b"resident" * MIB, name=f"{APP}:resident")
    await take(program, small.tar())
    made, _ = layout(*(bytes([n]) * 6 * MIB for n in range(4)))
    with pytest.raises(NoSpaceError, match="max_size"):
        await take(program, made.tar())
    assert program.on_disk() <= 20_000_000
    assert not list((program.root / "ingest").iterdir())
    # What came of the bundle is gone again; what had to go for it is not back.
    assert program.stored() <= {digest_of(data) for data in small.files.values()}


async def test_a_manifest_that_lies_about_a_size_is_refused(full):
    made = Layout()
    described = made.add_manifest(b"layer")
    document = json.loads(made.files.pop(path(described["digest"])))
    document["layers"][0]["size"] = 4
    made.list(made.add(document, described["mediaType"]), name=f"{APP}:1")
    (image,) = (await take(full, made.tar()))["images"]
    assert "stated" in image["reason"]
    assert (await full.manifest("library/app", "1")).status == 404
    assert digest_of(b"layer") not in full.stored()


async def test_an_index_that_contains_itself_or_has_no_end_is_refused(full):
    made = Layout()
    described = made.add_manifest(b"layer")
    for _ in range(10):
        described = made.add_index(described)
    made.list(described, name=f"{APP}:1")
    (image,) = (await take(full, made.tar()))["images"]
    assert "nested" in image["reason"]
    assert (await full.manifest("library/app", "1")).status == 404


async def test_a_blob_of_another_size_than_the_store_has_is_refused(full):
    known = path(digest_of(b"resident"))
    await refuse(full, plus(layout()[0], entry(known), content=b"residents"), says="bytes")


async def test_extended_headers_are_read_with_care(full):
    for records in (
        {"path": "../evil"},
        {"size": "-1"},
        {"size": "9" * 30},
        {"GNU.sparse.major": "1"},
        {"comment": "x" * 100_000},
    ):
        odd = entry("harmless")
        odd.pax_headers = records
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(odd, io.BytesIO())
        await refuse(full, buffer.getvalue() + plus(layout()[0]))


async def test_a_layout_in_the_store_is_never_written_through_a_link(full, tmp_path):
    made, _ = layout(b"elsewhere")
    digest = digest_of(b"elsewhere")
    (full.root / path(digest)).symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    await take(full, made.tar())
    assert sorted(tmp_path.iterdir()) == before
    assert (await full.blob(digest)).digest == digest
