"""Row M15 by random mutations: the store stays as it was or has one more image."""

import io
import random
import tarfile
from contextlib import suppress

from hypothesis import HealthCheck, given, settings, strategies as st

from proxy.errors import ProxyError
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.support.admin_api import remove_images
from tests.support.bundles import (
    APP_FULL_NAME,
    LayoutBuilder,
    blob_path,
    build_layout,
    import_bundle,
)
from tests.support.examples import scaled

MIB = 1 << 20

Entries = list[tuple[tarfile.TarInfo, bytes]]

MUTATIONS = ("flip", "truncate", "shuffle", "drop", "duplicate", "rename", "retype", "add")


def read_entries(bundle: bytes) -> Entries:
    """Return the entries of a tar with their contents."""
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        files = [(entry, archive.extractfile(entry)) for entry in archive]
        return [(entry, file.read() if file else b"") for entry, file in files]


def write_entries(entries: Entries) -> bytes:
    """Return a tar of entries, written as they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, content in entries:
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def mutate(bundle: bytes, mutation: str, rng: random.Random) -> bytes:
    """Return the bundle with one random mutation of this kind."""
    entries = read_entries(bundle)
    position = rng.randrange(len(entries))
    if mutation == "flip":
        return flip(bundle, rng.randrange(len(bundle)))
    if mutation == "truncate":
        return bundle[: rng.randrange(len(bundle))]
    if mutation == "shuffle":
        rng.shuffle(entries)
    elif mutation == "drop":
        del entries[position]
    elif mutation == "duplicate":
        entries.insert(rng.randrange(len(entries)), entries[position])
    elif mutation == "rename":
        entries[position][0].name = rng.choice(["../x", "/x", "blobs/x", "a" * 200, "x/../y"])
    elif mutation == "retype":
        entries[position][0].type = rng.choice([tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
        entries[position][0].linkname = "/etc/passwd"
    else:
        entries.insert(position, (tarfile.TarInfo(blob_path(digest_of(b"y"))), b""))
    return write_entries(entries)


@settings(
    max_examples=scaled(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutation=st.sampled_from(MUTATIONS), seed=st.integers(0, 1 << 32))
async def test_m15_a_mutated_bundle_is_rejected_or_harmless(program, mutation, seed):
    layout, _ = build_layout(b"resident", name=f"{APP_FULL_NAME}:resident")
    await import_bundle(program, layout.to_tar())
    stored_before = program.stored()
    new = LayoutBuilder()
    new.list_image(new.add_manifest(b"one" * 3000, b"two"), name=f"{APP_FULL_NAME}:1")
    new_blobs = {digest_of(content) for name, content in new.files.items() if "/" in name}
    outside = sorted(program.root.parent.iterdir())
    imported = []
    with suppress(ProxyError):
        report = await import_bundle(program, mutate(new.to_tar(), mutation, random.Random(seed)))
        imported = [
            image["name"]
            for image in report["images"]
            if not image["missing"] and not image["reason"]
        ]
    assert program.stored() == stored_before | (new_blobs if imported else set())
    assert list((program.root / "ingest").iterdir()) == []
    assert sorted(program.root.parent.iterdir()) == outside
    assert (await program.manifest("library/app", "resident")).status == 200
    if imported:  # under another name, if the mutation has changed it
        await remove_images(program, *imported)
    assert (await program.manifest("library/app", "1")).status == 404
