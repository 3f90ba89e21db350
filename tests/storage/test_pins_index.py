"""Content that a pin reaches is never evicted, in whatever order content and pins arrive."""

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.reference import Repository, Tag
from proxy.oci.referrers import ReferrerRecord, fallback_tag
from proxy.storage.blobs import BlobStore, allocated_size
from proxy.storage.fsck import check_store
from proxy.storage.image_queries import open_image_queries
from proxy.storage.index import Index
from tests.fakes.clock import Clock

APP = Repository("docker.io", "library/app")
OTHER = Repository("docker.io", "library/other")
V1 = Tag("v1")
SIZE = 5000

_numbers = count()


def digest() -> Digest:
    return Digest.from_content(str(next(_numbers)).encode())


def manifest(*children: Digest, media_type: str = OCI_MANIFEST, subject: Digest | None = None):
    named = tuple(Descriptor(child, SIZE, "", None, is_foreign=False) for child in children)
    return Manifest(media_type, named, subject, "", {})


async def add_manifest(
    index: Index, *children: Digest, repository: Repository = APP, **kw
) -> Digest:
    """Add a manifest that names the children, and return its digest."""
    made = digest()
    await index.add_manifest(repository, made, SIZE, manifest(*children, **kw))
    return made


async def blobs(index: Index, number: int) -> list[Digest]:
    made = [digest() for _ in range(number)]
    for one in made:
        await index.add_blob(APP, one, SIZE)
    return made


async def victims(index: Index) -> set[Digest]:
    return {digest for digest, _, _ in await index.least_recently_used(1000)}


async def test_a_pinned_tag_protects_its_image_and_its_referrers(index):
    config, layer, other, signature = await blobs(index, 4)
    image = await add_manifest(index, config, layer)
    await index.set_tag(APP, V1, image)
    referrer = await add_manifest(index, signature, subject=image)
    await index.pin([(APP, V1)])
    assert await victims(index) == {other}
    assert index.totals.pinned_bytes == 5 * allocated_size(SIZE)
    late = await add_manifest(index, other, subject=referrer)
    assert await victims(index) == set()
    await index.unpin([(APP, V1)])
    assert await victims(index) == {config, layer, other, image, signature, referrer, late}
    assert index.totals.pinned_bytes == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
async def test_content_that_arrives_after_the_pin_is_pinned_on_arrival(index, order: Sequence[int]):
    layer, image, whole = digest(), digest(), digest()
    await index.pin([(APP, V1)])
    await index.set_tag(APP, V1, whole)
    steps = [
        lambda: index.add_blob(APP, layer, SIZE),
        lambda: index.add_manifest(APP, image, SIZE, manifest(layer)),
        lambda: index.add_manifest(APP, whole, SIZE, manifest(image, media_type=OCI_INDEX)),
    ]
    for step in order:
        await steps[step]()
    assert await victims(index) == set()


async def test_a_digest_may_be_pinned_before_it_is_stored(index):
    layer, image = digest(), digest()
    await index.pin([(APP, image)])
    await index.add_manifest(APP, image, SIZE, manifest(layer))
    await index.add_blob(APP, layer, SIZE)
    assert await victims(index) == set()


async def test_a_pin_follows_its_tag_and_shared_layers_stay(index):
    shared, old_layer, new_layer = await blobs(index, 3)
    old = await add_manifest(index, shared, old_layer)
    await index.set_tag(APP, V1, old)
    await index.pin([(APP, V1)])
    new = await add_manifest(index, shared, new_layer)
    assert await victims(index) == {new, new_layer}
    await index.set_tag(APP, V1, new)
    assert await victims(index) == {old, old_layer}


async def test_a_pin_applies_to_one_repository_and_one_tag(index):
    image = await add_manifest(index)
    other = await add_manifest(index, repository=OTHER)
    await index.set_tag(APP, V1, image)
    await index.set_tag(OTHER, V1, other)
    await index.pin([(APP, V1)])
    assert await victims(index) == {other}
    await index.unpin([(OTHER, V1), (APP, Tag("v2"))])
    assert await victims(index) == {other}


async def test_a_tag_that_upstream_has_deleted_keeps_its_pinned_image(index):
    image = await add_manifest(index)
    await index.set_tag(APP, V1, image)
    await index.pin([(APP, V1)])
    await index.delete_tag(APP, V1)
    assert await victims(index) == set()


async def test_a_damaged_manifest_does_not_unpin_its_layers(index):
    (layer,) = await blobs(index, 1)
    image = await add_manifest(index, layer)
    await index.pin([(APP, image)])
    await index.remove_blobs([image], lambda _: None)
    assert await victims(index) == set()
    await index.add_manifest(APP, image, SIZE, manifest(layer))
    assert await victims(index) == set()


async def test_pins_survive_a_restart(tmp_path):
    path = tmp_path / "index.sqlite"
    for _ in range(2):
        index = await asyncio.to_thread(Index, path, Clock())
        if not await victims(index):
            image = await add_manifest(index)
            await index.pin([(APP, image)])
            await add_manifest(index)
        assert len(await victims(index)) == 1
        assert index.totals.pinned_bytes == allocated_size(SIZE)
        await asyncio.to_thread(index.close)


@pytest.mark.parametrize("tag", [fallback_tag, lambda subject: Tag(f"{fallback_tag(subject)}.sig")])
async def test_a_pinned_image_keeps_what_the_tags_for_its_referrers_name(index, tag):
    config, layer, signature, late, moved = await blobs(index, 5)
    image = await add_manifest(index, config)
    await index.set_tag(APP, V1, image)
    before = await add_manifest(index, layer)
    await index.set_tag(APP, tag(image), before)
    await index.pin([(APP, V1)])
    assert await victims(index) == {signature, late, moved}
    # The tag moves to a manifest that is stored, and then to one that is not.
    await index.set_tag(APP, tag(image), await add_manifest(index, signature))
    assert signature not in await victims(index)
    announced = digest()
    await index.set_tag(APP, tag(image), announced)
    await index.add_manifest(APP, announced, SIZE, manifest(late))
    assert late not in await victims(index)
    await index.unpin([(APP, V1)])
    assert await victims(index) >= {config, layer, signature, late}


async def test_a_record_of_referrers_lasts_as_long_as_its_subject(index):
    (image,) = await blobs(index, 1)
    record = ReferrerRecord([{"digest": "sha256:x", "unknown": [1]}], ["sha256-y.sig"])
    await index.set_referrer_records(APP, {image: record})
    assert index.referrer_record(APP, image) == record
    assert index.referrer_record(OTHER, image) is None
    await index.set_referrer_records(APP, {digest(): record})
    await index.remove_blobs([image], lambda _: None)
    assert index.referrer_record(APP, image) is None


@pytest.mark.parametrize("version", [1, 2])
async def test_a_store_of_an_older_version_opens_with_all_its_content(tmp_path, version):
    path, layer, image = tmp_path / "index.sqlite", digest(), digest()
    with closing(sqlite3.connect(path)) as old, old:
        old_schema = Path(__file__).with_name(f"schema_{version}.sql").read_text()
        old.executescript(f"{old_schema}; PRAGMA user_version = {version}")
        old.execute("INSERT INTO repositories VALUES (7, 'docker.io', 'library/app')")
        rows = [(str(layer), SIZE, None, None, 1.0), (str(image), SIZE, OCI_MANIFEST, None, 2.0)]
        query = "INSERT INTO blobs (digest, size, media_type, subject, used) VALUES (?, ?, ?, ?, ?)"
        old.executemany(query, rows)
        old.execute("INSERT INTO edges VALUES (?, ?, ?)", (str(image), str(layer), SIZE))
        old.executemany("INSERT INTO links VALUES (7, ?)", [(str(layer),), (str(image),)])
        old.execute("INSERT INTO tags VALUES (7, 'v1', ?, 5.0)", (str(image),))
        names = [f"{fallback_tag(image)}", f"{fallback_tag(image)}.sig", f"{fallback_tag(image)}0"]
        signature = (str(digest()), SIZE, OCI_MANIFEST, None, 3.0)
        old.execute(query, signature)
        old.execute("INSERT INTO links VALUES (7, ?)", signature[:1])
        tags = [(name, signature[0]) for name in names]
        old.executemany("INSERT INTO tags VALUES (7, ?, ?, 5.0)", tags)
    index = await asyncio.to_thread(Index, path, Clock())
    found = index.tag(APP, V1)
    assert found is not None
    assert (found.digest, found.checked_at) == (image, 5.0)
    assert [one for one, _, _ in await index.least_recently_used(2)] == [layer, image]
    with open_image_queries(path) as queries:
        assert {str(row.reference) for row in queries.images()} == {"v1", names[2]}
    assert index.declared_size(APP, layer) == SIZE
    await index.pin([(APP, V1)])
    assert await victims(index) == set()
    await asyncio.to_thread(index.close)
    assert schema(path) == schema(await new_index(tmp_path / "new.sqlite"))


async def new_index(path: Path) -> Path:
    index = await asyncio.to_thread(Index, path, Clock())
    await asyncio.to_thread(index.close)
    return path


def schema(path: Path) -> list[tuple[str, ...]]:
    """Return tables and views with their columns, and the indexes as declared."""
    with closing(sqlite3.connect(path)) as connection:
        columns = connection.execute(
            "SELECT m.name, c.name, c.type, c.dflt_value, c.'notnull' FROM sqlite_master m"
            " JOIN pragma_table_info(m.name) c WHERE m.type != 'index' ORDER BY 1, 2"
        ).fetchall()
        indexes = "SELECT name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
        version = connection.execute("PRAGMA user_version").fetchall()
        return columns + connection.execute(indexes).fetchall() + version


class TestFsck:
    """fsck keeps pins, because no file contains them."""

    @pytest.fixture
    async def root(self, tmp_path):
        """A store with a pinned image of one layer, and another blob."""
        layer, other = b"layer", b"other"
        content = (
            b'{"mediaType":"%s","config":{"mediaType":"x","digest":"%s","size":5},"layers":[]}'
            % (OCI_MANIFEST.encode(), str(Digest.from_content(layer)).encode())
        )
        store = await asyncio.to_thread(BlobStore, tmp_path / "store")
        for one in (layer, other, content):
            await asyncio.to_thread(store.commit_bytes, Digest.from_content(one), one)
        index = await asyncio.to_thread(Index, store.root / "index.sqlite", Clock())
        await index.set_tag(APP, V1, Digest.from_content(content))
        await index.pin([(APP, V1)])
        await asyncio.to_thread(index.close)
        store.close()
        return store.root

    async def check(self, root: Path) -> set[Digest]:
        await asyncio.to_thread(check_store, root, dry_run=False, on_progress=lambda *_: None)
        index = await asyncio.to_thread(Index, root / "index.sqlite", Clock())
        left = await victims(index)
        await asyncio.to_thread(index.close)
        return left

    async def test_when_the_index_is_whole(self, root):
        assert await self.check(root) == {Digest.from_content(b"other")}

    async def test_when_the_index_is_damaged_beside_them(self, root):
        path = root / "index.sqlite"
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'edges'"
        with closing(sqlite3.connect(path)) as connection:
            (page,) = connection.execute(query).fetchone()
            (size,) = connection.execute("PRAGMA page_size").fetchone()
        content = bytearray(path.read_bytes())
        content[(page - 1) * size : page * size] = bytes([0xA5]) * size
        path.write_bytes(content)
        assert await self.check(root) == {Digest.from_content(b"other")}
        assert (root / "index.sqlite.broken").exists()
