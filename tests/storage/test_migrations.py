"""An index of an earlier version is brought up to date: what it knew stays good."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.storage.index import BlobRow, Index, TagRow
from proxy.storage.records.policies import PolicyRecords
from tests.fakes.clock import Clock

SCHEMA_1 = (Path(__file__).parent / "schema_1.sql").read_text(encoding="utf-8")
APP = Repository("docker.io", "library/app")
OTHER = Repository("docker.io", "library/other")
ELSEWHERE = Repository("ghcr.io", "library/app")
MANIFEST, LAYER, EVICTED, FOREIGN, PRIVATE = (Digest.from_content(b"%d" % n) for n in range(5))
TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def old_index(tmp_path):
    """The index of 0.1.0 after a pull of an image, of which one layer was evicted."""
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(f"{SCHEMA_1} PRAGMA user_version = 1")
        connection.execute("INSERT INTO repositories VALUES (1, ?, ?)", (APP.upstream, APP.name))
        connection.execute("INSERT INTO repositories VALUES (2, ?, ?)", ("ghcr.io", "me/private"))
        connection.executemany(
            "INSERT INTO blobs (digest, size, media_type, used) VALUES (?, ?, ?, ?)",
            [
                (str(MANIFEST), 5, TYPE, 3.0),
                (str(LAYER), 7, None, 2.0),
                (str(PRIVATE), 8, None, 1.0),
            ],
        )
        connection.executemany(
            "INSERT INTO edges VALUES (?, ?, ?)",
            [(str(MANIFEST), str(child), 7) for child in (LAYER, EVICTED, FOREIGN)],
        )
        connection.executemany(
            "INSERT INTO links VALUES (?, ?)",
            [(1, str(MANIFEST)), (1, str(LAYER)), (1, str(EVICTED)), (2, str(PRIVATE))],
        )
        connection.execute("INSERT INTO tags VALUES (1, 'latest', ?, 9.0)", (str(MANIFEST),))
    return path


@pytest.fixture
def index(old_index):
    with closing(Index(old_index, Clock())) as index:
        yield index


def test_what_was_served_is_still_served(index):
    assert index.blob(APP, MANIFEST) == BlobRow(5, TYPE, is_linked=True)
    assert index.blob(APP, LAYER) == BlobRow(7, None, is_linked=True)
    assert index.tag(APP, Tag("latest")) == TagRow(MANIFEST, 9.0, TYPE)
    assert index.blob(OTHER, LAYER) == BlobRow(7, None, is_linked=False)


def test_upstreams_have_sent_what_their_repositories_are_linked_to(index):
    assert index.has_sent("docker.io", LAYER)
    assert not index.has_sent("ghcr.io", LAYER)
    assert index.has_sent("ghcr.io", PRIVATE)
    assert not index.has_sent("docker.io", PRIVATE)


async def test_a_link_to_what_was_not_stored_opens_nothing_that_comes_later(index):
    await index.add_blob(ELSEWHERE, EVICTED, 7)
    assert index.blob(APP, EVICTED) == BlobRow(7, None, is_linked=False)
    assert index.declared_size(APP, EVICTED) == 7


def test_foreign_layers_are_known_as_such(index):
    assert set(index.children(MANIFEST, 10)) == {LAYER, EVICTED}
    assert index.declared_size(APP, FOREIGN) is None


async def test_it_is_upgraded_once_and_then_opened_as_it_is(index):
    await index.add_blob(APP, FOREIGN, 1)
    await asyncio.to_thread(index.close)
    again = await asyncio.to_thread(Index, index.path, Clock())
    assert again.blob(APP, FOREIGN) == BlobRow(1, None, is_linked=True)
    assert again.blob(APP, LAYER) == BlobRow(7, None, is_linked=True)
    await asyncio.to_thread(again.close)


def test_the_history_of_a_tag_begins_with_what_it_meant(index):
    (meaning,) = PolicyRecords(index).meanings(APP, Tag("latest"))
    assert (meaning.digest, meaning.first_seen, meaning.last_seen) == (MANIFEST, 9.0, 9.0)
