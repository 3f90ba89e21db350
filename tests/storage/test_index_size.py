"""The index gives back the room of what was removed, and free pages count as free."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.reference import Repository, Tag
from proxy.storage import index_writes
from proxy.storage.fsck import check_store
from proxy.storage.index import Index
from proxy.storage.index_writes import MAX_CHILDREN
from proxy.storage.space import MAX_INDEX_SHARE
from tests.fakes.clock import Clock
from tests.storage.test_space import StoreRig, open_rig

APP = Repository("docker.io", "library/app")
CHILDREN = 1000
MIB = 1 << 20


def digest(*numbers: int) -> Digest:
    return Digest.from_content(repr(numbers).encode())


def make_manifest(number: int, children: int = CHILDREN) -> Manifest:
    descriptors = tuple(
        Descriptor(digest(number, child), 1, "", None, is_foreign=False)
        for child in range(children)
    )
    return Manifest(OCI_MANIFEST, descriptors, None, "", {})


async def fill(index: Index, manifests: int) -> list[Digest]:
    """Add manifests of a thousand children each."""
    added = [digest(number) for number in range(manifests)]
    for number, one in enumerate(added):
        await index.add_manifest(APP, one, 1, make_manifest(number))
    return added


def read_repositories(index: Index) -> list[tuple[str, int]]:
    """Return names and numbers of manifests of the repositories in the index."""
    with closing(sqlite3.connect(index.path)) as connection:
        return connection.execute("SELECT name, manifests FROM repositories ORDER BY 1").fetchall()


def file_size(index: Index) -> int:
    return sum(path.stat().st_size for path in index.path.parent.glob("index.sqlite*"))


async def test_an_index_gets_smaller_on_disk_when_content_goes(index):
    small = index.used_bytes()
    digests = await fill(index, 20)
    large = index.used_bytes()
    assert large > small + 5 * MIB
    assert file_size(index) >= large
    await index.remove_blobs(digests, lambda _: None)
    assert index.used_bytes() < small + 3 * MIB
    # Each write gives back some pages, so that none takes long.
    for _ in range(20):
        await index.add_blob(APP, digest(1, 2, 3), 1)
    assert file_size(index) < small + 3 * MIB


async def test_free_pages_of_an_older_index_do_not_count(tmp_path):
    path = tmp_path / "index.sqlite"
    index = await asyncio.to_thread(Index, path, Clock())
    await index.remove_blobs(await fill(index, 20), lambda _: None)
    await asyncio.to_thread(index.close)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("PRAGMA auto_vacuum = NONE")
        old.execute("VACUUM")
    index = await asyncio.to_thread(Index, path, Clock())
    digests = await fill(index, 20)
    full = index.used_bytes()
    await index.remove_blobs(digests, lambda _: None)
    await index.add_blob(APP, digest(1, 2, 3), 1)
    assert path.stat().st_size > 5 * MIB
    assert index.used_bytes() < full - 5 * MIB
    await asyncio.to_thread(index.close)


async def test_a_repository_is_forgotten_with_the_last_of_its_content(index):
    other, tag = Repository("docker.io", "library/other"), Tag("latest")
    (manifest,) = await fill(index, 1)
    await index.link(other, manifest)
    await index.pin([(other, Tag("next"))])
    assert read_repositories(index) == [("library/app", 1), ("library/other", 1)]
    await index.remove_blobs([manifest], lambda _: None)
    assert read_repositories(index) == [("library/other", 0)]
    await index.unpin([(other, Tag("next"))])
    assert read_repositories(index) == []
    (manifest,) = await fill(index, 1)
    await index.delete_images([(APP, manifest)])
    assert read_repositories(index) == []
    # What a tag meant is remembered.
    await index.set_tag(other, tag, manifest)
    await index.delete_tag(other, tag)
    assert read_repositories(index) == [("library/other", 0)]


async def test_with_a_repository_everything_that_refers_to_it_is_deleted(index):
    await index.set_tag(APP, Tag("latest"), digest(1))
    tables = {}
    for (table,) in index._writer.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
        columns = index._writer.execute(f"PRAGMA table_info({table})").fetchall()
        if any(name == "repository" for _, name, *_ in columns):
            tables[table] = ["x" if kind == "TEXT" else 1 for _, _, kind, *_ in columns]
    # These two keep a repository from being chosen.
    del tables["pins"], tables["policy_exceptions"]
    assert len(tables) >= 5
    for table, row in tables.items():
        marks = ", ".join("?" * len(row))
        index._writer.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)
    index._writer.commit()
    await index.delete_repositories([1])
    for table in (*tables, "repositories"):
        assert index._writer.execute(f"SELECT * FROM {table}").fetchall() == []


def make_old_index(path: Path, manifests: dict[Digest, list[Digest]]) -> None:
    """Make an index of version 2, which never gave room back, with manifests and their links."""
    with closing(sqlite3.connect(path)) as old, old:
        old.executescript(
            Path(__file__).with_name("schema_2.sql").read_text() + "PRAGMA user_version = 2"
        )
        old.execute("PRAGMA journal_mode = WAL")
        old.execute("INSERT INTO repositories VALUES (7, 'docker.io', 'library/app')")
        old.execute("INSERT INTO repositories VALUES (8, 'docker.io', 'library/empty')")
        old.execute("CREATE TABLE ballast (text)")
        old.execute("INSERT INTO ballast VALUES (zeroblob(20000000))")
        for manifest, children in manifests.items():
            query = "INSERT INTO blobs VALUES (?, 1, ?, NULL, 1.0, 0)"
            old.execute(query, (str(manifest), OCI_MANIFEST))
            rows = [(str(manifest), str(child), 1) for child in children]
            old.executemany("INSERT INTO edges VALUES (?, ?, ?)", rows)
            links = [(str(one),) for one in (manifest, *children)]
            old.executemany("INSERT INTO links VALUES (7, ?)", links)
        old.execute("DROP TABLE ballast")


def test_an_older_index_is_written_anew_when_it_is_upgraded(tmp_path):
    path = tmp_path / "index.sqlite"
    within, beyond = digest(0), digest(1)
    manifests = {
        within: [digest(0, child) for child in range(MAX_CHILDREN)],
        beyond: [digest(1, child) for child in range(MAX_CHILDREN + 1)],
    }
    make_old_index(path, manifests)
    assert path.stat().st_size > 20_000_000
    index = Index(path, Clock())
    assert path.stat().st_size < 3 * MIB
    assert len(index.children(within, 10_000)) == MAX_CHILDREN
    # Upstream is asked for the manifest again, and it is not indexed this time.
    assert index.manifest(beyond) is None
    assert index.blob_size(beyond) == 1
    assert index.children(beyond, 10_000) == []
    rows = index._writer.execute("SELECT name, manifests FROM repositories").fetchall()
    assert rows == [("library/app", 1)]
    index.close()


@pytest.mark.parametrize("auto_vacuum", ["NONE", "INCREMENTAL"])
def test_fsck_writes_the_index_anew(tmp_path, auto_vacuum):
    path = tmp_path / "index.sqlite"
    with closing(index_writes.open_connection(path)) as connection:
        connection.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        connection.execute("VACUUM")
        connection.execute("CREATE TABLE ballast (text)")
        connection.execute("INSERT INTO ballast VALUES (zeroblob(20000000))")
        connection.execute("DROP TABLE ballast")
        connection.commit()
    assert path.stat().st_size > 20_000_000
    check_store(tmp_path, dry_run=False, on_progress=lambda *_: None)
    assert path.stat().st_size < MIB


class TestShare:
    """The index takes a quarter of the store at most; its own rows make room for others."""

    CAP = 10 * MIB
    SHARE = int(CAP * MAX_INDEX_SHARE)

    @pytest.fixture
    async def rig(self, tmp_path):
        async with open_rig(tmp_path / "store", cap=self.CAP) as rig:
            yield rig

    async def commit(self, rig: StoreRig, number: int, children: int = 500) -> Digest | None:
        """Commit a manifest as `ManifestStore` does; None if there is no space."""
        content = str(number).encode()
        one = Digest.from_content(content)
        reservation = await rig.space.reserve_manifests(len(content), children)
        if reservation is None:
            return None
        manifest = make_manifest(number, children)
        await rig.committer.commit_manifest(APP, one, content, manifest, reservation)
        assert rig.on_disk() <= rig.space.max_size
        assert rig.index.row_bytes <= rig.space.max_size * MAX_INDEX_SHARE
        return one

    async def test_manifests_evict_manifests_and_no_layers_beyond_it(self, rig):
        layers = [await rig.fetch(MIB) for _ in range(9)]
        assert all(map(rig.holds, layers))
        manifests = [await self.commit(rig, number) for number in range(20)]
        assert all(manifests)
        assert sum(map(rig.holds, layers)) >= 5
        assert rig.holds(manifests[-1])
        assert not rig.holds(manifests[0])
        assert b'evictions_total{reason="index_full"} 0.0' not in await asyncio.to_thread(
            rig.metrics.render
        )
        # What a layer needs is there, now and after a restart.
        assert rig.holds(await rig.fetch(4 * MIB))
        assert rig.is_right()

    async def test_names_of_one_manifest_evict_names(self, tmp_path):
        """A registry that has every name must not fill the store with names of one manifest."""
        cap = 8 * MIB
        async with open_rig(tmp_path / "store", cap=cap) as rig:
            hot = await self.commit(rig, 0, children=3)
            assert hot
            other = await rig.fetch(MIB)
            names = [Repository("docker.io", f"{number}/{'x' * 240}") for number in range(3000)]
            for number, repository in enumerate(names):
                await rig.index.set_tag(repository, Tag("latest"), hot)
                rig.index.touch(hot)
                if number % 200 == 0:
                    await rig.space.shrink_index()
                    await rig.index.add_blob(APP, digest(number), 1)
            await rig.space.shrink_index()
            assert rig.index.row_bytes <= 1.1 * cap * MAX_INDEX_SHARE
            assert rig.holds(hot)
            assert rig.holds(other)
            assert rig.index.tag(names[-1], Tag("latest"))
            assert not rig.index.tag(names[0], Tag("latest"))

    async def test_pinned_images_stay_and_then_others_are_not_stored(self, rig):
        pinned = []
        for number in range(40):
            one = await self.commit(rig, number)
            if one is None:
                break
            await rig.index.pin([(APP, one)])
            pinned.append(one)
        assert 2 < len(pinned) < 10
        assert all(map(rig.holds, pinned))
        assert rig.space.uncached_reason(4, 500) == "index_full"
        assert rig.holds(await rig.fetch(4 * MIB))

    async def test_an_index_beyond_its_share_shrinks_at_the_start(self, tmp_path):
        async with open_rig(tmp_path / "big", cap=100 * MIB) as rig:
            manifests = [await self.commit(rig, number) for number in range(30)]
            assert rig.index.row_bytes > 1.5 * self.SHARE
        async with open_rig(tmp_path / "big", cap=self.CAP) as rig:
            assert not rig.holds(manifests[0])
            # The maintenance goes on with it.
            while rig.index.row_bytes > self.SHARE:
                assert await rig.space.shrink_index()
            assert rig.holds(manifests[-1])
            assert rig.is_right()
