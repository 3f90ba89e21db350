"""The index gives back the room of what was removed, and free pages count as free."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.reference import Repository
from proxy.storage import queries
from proxy.storage.fsck import check_store
from proxy.storage.index import Index
from proxy.storage.queries import MAX_CHILDREN
from tests.fakes.clock import Clock

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


def make_old_index(path: Path, manifests: dict[Digest, list[Digest]]) -> None:
    """Make an index of version 2, which never gave room back, with manifests and their links."""
    with closing(sqlite3.connect(path)) as old, old:
        old.executescript(
            Path(__file__).with_name("schema_2.sql").read_text() + "PRAGMA user_version = 2"
        )
        old.execute("PRAGMA journal_mode = WAL")
        old.execute("INSERT INTO repositories VALUES (7, 'docker.io', 'library/app')")
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
    index.close()


@pytest.mark.parametrize("auto_vacuum", ["NONE", "INCREMENTAL"])
def test_fsck_writes_the_index_anew(tmp_path, auto_vacuum):
    path = tmp_path / "index.sqlite"
    with closing(queries.open_connection(path)) as connection:
        connection.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        connection.execute("VACUUM")
        connection.execute("CREATE TABLE ballast (text)")
        connection.execute("INSERT INTO ballast VALUES (zeroblob(20000000))")
        connection.execute("DROP TABLE ballast")
        connection.commit()
    assert path.stat().st_size > 20_000_000
    check_store(tmp_path, dry_run=False, on_progress=lambda *_: None)
    assert path.stat().st_size < MIB
