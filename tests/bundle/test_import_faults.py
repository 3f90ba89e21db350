"""Row M15 again, by chance: whatever a bundle holds, the store is as it was, or has an image more."""

import asyncio
import io
import os
import random
import tarfile
from collections.abc import AsyncIterator
from contextlib import suppress

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from proxy.errors import BundleError, ProxyError
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.support.admin_api import remove
from tests.support.bundles import APP, Layout, layout, path, take

MIB = 1 << 20

Entries = list[tuple[tarfile.TarInfo, bytes]]


def entries(bundle: bytes) -> Entries:
    with tarfile.open(fileobj=io.BytesIO(bundle)) as archive:
        files = [(entry, archive.extractfile(entry)) for entry in archive]
        return [(entry, file.read() if file else b"") for entry, file in files]


def packed(content: Entries) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry, data in content:
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def mutated(bundle: bytes, what: str, chance: random.Random) -> bytes:
    content = entries(bundle)
    place = chance.randrange(len(content))
    if what == "flip":
        return flip(bundle, chance.randrange(len(bundle)))
    if what == "cut":
        return bundle[: chance.randrange(len(bundle))]
    if what == "order":
        chance.shuffle(content)
    elif what == "drop":
        del content[place]
    elif what == "twice":
        content.insert(chance.randrange(len(content)), content[place])
    elif what == "name":
        content[place][0].name = chance.choice(["../x", "/x", "blobs/x", "a" * 200, "x/../y"])
    elif what == "kind":
        content[place][0].type = chance.choice([tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
        content[place][0].linkname = "/etc/passwd"
    else:
        content.insert(place, (tarfile.TarInfo(path(digest_of(b"y"))), b""))
    return packed(content)


KINDS = ("flip", "cut", "order", "drop", "twice", "name", "kind", "extra")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(what=st.sampled_from(KINDS), seed=st.integers(0, 1 << 32))
async def test_m15_a_bundle_that_was_changed_anyhow_is_refused_or_harmless(program, what, seed):
    made, _ = layout(b"resident", name=f"{APP}:resident")
    await take(program, made.tar())
    kept = program.stored()
    new = Layout()
    new.list(new.add_manifest(b"one" * 3000, b"two"), name=f"{APP}:1")
    good = {digest_of(content) for name, content in new.files.items() if "/" in name}
    outside = sorted(program.root.parent.iterdir())
    taken = []
    with suppress(ProxyError):
        report = await take(program, mutated(new.tar(), what, random.Random(seed)))
        taken = [
            one["name"] for one in report["images"] if not one["missing"] and not one["reason"]
        ]
    assert program.stored() == kept | (good if taken else set())
    assert list((program.root / "ingest").iterdir()) == []
    assert sorted(program.root.parent.iterdir()) == outside
    assert (await program.manifest("library/app", "resident")).status == 200
    if taken:  # perhaps under another name: that is what the change was then
        await remove(program, *taken)
    assert (await program.manifest("library/app", "1")).status == 404


async def test_m15_blobs_that_no_image_names_do_not_stay(program):
    made, _ = layout(b"named")
    made.add(b"nobody's")
    report = await take(program, made.tar())
    assert report["added"] == 3
    assert digest_of(b"nobody's") not in program.stored()


async def test_m15_a_sparse_terabyte_is_refused_before_it_takes_any_room(program):
    header = tarfile.TarInfo(path(digest_of(b"x")))
    header.size = 1 << 40
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    before = program.on_disk()
    with pytest.raises(BundleError):
        await take(program, header.tobuf(tarfile.PAX_FORMAT) + bytes(1 * MIB))
    assert program.on_disk() - before < MIB


async def test_a_stop_in_the_midst_of_an_import_leaves_whole_blobs_and_nothing_else(program):
    made, digest = layout(b"x" * MIB, os.urandom(4 * MIB))
    bundle = made.tar()
    release = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bundle[: 3 * MIB]
        await release.wait()
        yield bundle[3 * MIB :]

    async def send() -> None:
        connector = aiohttp.UnixConnector(f"{program.root}/admin.sock")
        async with aiohttp.ClientSession(connector=connector) as session:
            with pytest.raises(aiohttp.ClientError):
                async with session.post("http://localhost/api/v1/import", data=slow()) as answer:
                    await answer.read()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        while await program.metric("pullcache_store_blobs") < 2:
            pass
        await program.stop()
        release.set()
    assert list((program.root / "ingest").iterdir()) == []
    assert digest_of(b"x" * MIB) in program.stored()
    await program.start()
    assert (await take(program, bundle))["already_stored"] >= 1
    assert (await program.manifest("library/app", "1")).digest == digest
