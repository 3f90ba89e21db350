"""A damaged or locked index: images pass through, and `/readyz` says what is wrong and what helps."""

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from proxy.errors import StorageError
from proxy.storage import index as storage_index
from proxy.storage.fsck import check_store
from tests.fakes.content import FakeImage
from tests.support.program import Program

PAGE_SIZE = 4096
TABLES = ("blobs", "links", "tags", "edges", "repositories", "pins", "senders")
# The indexes that the start does not read. What it reads is checked there.
INDEXES = ("links_by_digest", "edges_by_child", "tags_by_digest", "blobs_manifests")


def damage_page(path: Path, table: str, filler: int = 0xA5) -> None:
    """Overwrite the root page of a table's or index's tree."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (page,) = connection.execute(query, (table,)).fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * PAGE_SIZE)
        file.write(bytes([filler]) * PAGE_SIZE)


async def fsck(program: Program) -> None:
    await asyncio.to_thread(check_store, program.root, dry_run=False, on_progress=lambda *_: None)


async def add_images(program: Program) -> list[FakeImage]:
    registry = program.registry
    images = [
        registry.add_image(f"library/app{n}", layers=[b"%d" % n * 50], index=True) for n in range(4)
    ]
    for image in images:
        await program.pull(image)
    await program.wait_for_downloads()
    return images


@pytest.mark.parametrize("table", [*TABLES, *INDEXES])
async def test_images_pass_through_a_damaged_index_and_readyz_says_what_helps(program, table):
    images = await add_images(program)
    await program.stop()
    path = program.root / "index.sqlite"
    damage_page(path, table)
    await program.start()
    for image in images:
        await program.pull(image)
    assert (await program.ask("/healthz")).status == 200
    answer = await program.ask("/readyz")
    while answer.status == 200:  # the check after the start still runs
        answer = await program.ask("/readyz")
    assert answer.status == 503
    assert b"is damaged" in answer.body
    assert b"stop the daemon and run pullcache fsck" in answer.body
    await program.stop()
    await fsck(program)
    await program.start()
    assert (await program.ask("/readyz")).status == 200
    program.registry.requests.clear()
    for image in images:
        await program.pull(image)
    await program.wait_for_downloads()
    # What was stored still is: fsck has lost links and tags at most, so a byte proves each blob. If it
    # is not known who has sent them, they are sent again.
    blobs = sum(one.bytes_sent for one in program.registry.seen("GET /registry-v2/"))
    assert (blobs > len(images) * 100) is (table == "senders")


async def test_an_index_that_is_damaged_while_it_is_used_lets_images_pass(program):
    images = await add_images(program)
    path = program.root / "index.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for table in TABLES:
        damage_page(path, table)
    # A write makes the connections read the pages again.
    await program.manifest(program.registry.add_image("library/new"))
    for image in images:
        await program.pull(image)
    assert b"is damaged" in (await program.ask("/readyz")).body
    assert await program.metric("pullcache_index_damaged") == 1
    assert (await program.ask("/v2/_catalog")).status in (200, 500)


@pytest.mark.parametrize("seed", range(6))
async def test_flipped_bytes_anywhere_in_the_index_break_no_pull(program, seed):
    images = await add_images(program)
    await program.stop()
    path = program.root / "index.sqlite"
    chance = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(200):
        content[chance.randrange(PAGE_SIZE, len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    refusal = ""
    try:
        await program.start()
        for image in images:
            await program.pull(image)
        await program.stop()
    except StorageError as error:
        refusal = str(error)
    assert not refusal or "pullcache fsck" in refusal
    await fsck(program)
    await program.start()
    for image in images:
        await program.pull(image)
    assert (await program.ask("/readyz")).status == 200


@contextmanager
def locked_by_another_process(path: Path, statement: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Let another process hold the lock of writers for the block."""
    code = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
        " connection.execute(sys.argv[2]); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path), statement]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()


async def test_answers_do_not_wait_while_another_process_locks_the_index(program, monkeypatch):
    # If an answer waited for the lock, the test would take an hour.
    monkeypatch.setattr(storage_index, "LOCK_TIMEOUT", 3600.0)
    stored = await add_images(program)
    registry = program.registry
    path = program.root / "index.sqlite"
    with locked_by_another_process(path):
        fresh = [registry.add_image(f"library/new{n}", layers=[b"new%d" % n]) for n in range(5)]
        for image in (*stored, *fresh):
            await program.pull(image)
        program.clock.advance(3600)
        registry.delete_tag(stored[0].repository, "latest")
        assert (await program.manifest(stored[0])).status == 404
        for image in stored[1:]:
            await program.pull(image)
        answer = await program.ask("/readyz")
        assert answer.status == 503
        assert b"another process has locked it; find it with fuser" in answer.body
    # Commits have waited, and blobs are stored now.
    await program.wait_for_downloads()
    assert (await program.ask("/readyz")).status == 200
    assert {layer for image in fresh for layer in image.layers} <= program.stored()


async def test_a_full_store_evicts_while_another_process_locks_the_index(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    blobs = [registry.add_blob(os.urandom(4 << 20)) for _ in range(12)]
    for digest in blobs[:4]:
        assert (await program.blob(digest)).digest == digest
    await program.wait_for_downloads()
    with locked_by_another_process(program.root / "index.sqlite"):
        for digest in blobs[4:]:
            assert (await program.blob(digest)).digest == digest
            assert program.disk_usage() <= 20_000_000
    await program.wait_for_downloads()
    assert program.disk_usage() <= 20_000_000


async def test_a_commit_gives_up_when_the_lock_stays(program, monkeypatch):
    monkeypatch.setattr(storage_index, "LOCK_TIMEOUT", 0.2)
    digest = program.registry.add_blob(b"blob")
    with locked_by_another_process(program.root / "index.sqlite"):
        assert (await program.blob(digest)).digest == digest
        await program.wait_for_downloads()
        assert await program.metric("pullcache_uncached_total", reason="disk_error") == 1
        assert program.stored() == set()
    assert (await program.blob(digest)).digest == digest
    await program.wait_for_downloads()
    assert program.stored() == {digest}
