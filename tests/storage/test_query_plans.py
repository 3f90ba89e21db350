"""How SQLite answers the reads of the event loop: from a few rows, however large the index is."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import get_args

import pytest

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.reference import Repository, Tag
from proxy.storage.image_table import ImageFilter, ImageOrder, ImageTable
from proxy.storage.index import Index

APP = Repository("docker.io", "library/app")
BLOB = Digest.from_content(b"blob")

# Reads in the order of an index, of as many rows as the caller takes.
ORDERED_READS = {
    "SCAN blobs USING COVERING INDEX blobs_by_use",
    "SCAN json_each VIRTUAL TABLE INDEX 1:",
}

LOOP_READS: dict[str, Callable[[Index], object]] = {
    "blob": lambda index: index.blob(APP, BLOB),
    "manifest": lambda index: index.manifest(BLOB),
    "blob_size": lambda index: index.blob_size(BLOB),
    "has_sent": lambda index: index.has_sent(APP.upstream, BLOB),
    "declared_size": lambda index: index.declared_size(APP, BLOB),
    "children": lambda index: index.children(BLOB, 256),
    "tag": lambda index: index.tag(APP, Tag("latest")),
    "oldest_use": lambda index: index.oldest_use(),
    "is_pinned": lambda index: index.is_pinned(BLOB),
    "blobs_after": lambda index: index.blobs_after(str(BLOB), 256),
    "unknown_blobs": lambda index: index.unknown_blobs([BLOB]),
}


@contextmanager
def traced(connection: sqlite3.Connection) -> Iterator[list[str]]:
    """Yield the statements that the connection runs during the block."""
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    try:
        yield statements
    finally:
        connection.set_trace_callback(None)


def explain(index: Index, statement: str) -> list[str]:
    with closing(sqlite3.connect(index.path)) as connection:
        rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
    return [row[3] for row in rows]


@pytest.mark.parametrize("name", LOOP_READS)
async def test_a_read_in_the_loop_scans_no_table(index, name):
    with traced(index._reader) as statements:
        LOOP_READS[name](index)
    assert statements
    for statement in statements:
        scans = {step for step in explain(index, statement) if step.startswith("SCAN")}
        assert scans <= ORDERED_READS | {"SCAN e"}, statement


async def test_the_size_in_a_manifest_is_looked_up_from_the_blob_not_from_the_repository(index):
    with traced(index._reader) as statements:
        index.declared_size(APP, BLOB)
    plan = explain(index, statements[0])
    steps = [step for step in plan if "edges" in step or " l " in step]
    assert steps == [
        "SEARCH edges USING INDEX edges_by_child (child=?)",
        "SEARCH l USING COVERING INDEX links_by_digest (digest=? AND repository=?)",
    ]


async def test_a_size_is_found_among_many_links_and_a_bounded_number_of_manifests(index):
    child = Descriptor(BLOB, 7, "", None, is_foreign=False)
    parents = sorted(
        (Digest.from_content(bytes([number % 256, number // 256])) for number in range(300)),
        key=str,
    )
    for number, parent in enumerate(parents):
        manifest = Manifest(OCI_MANIFEST, (child,), None, "", {})
        await index.add_manifest(Repository("docker.io", f"team/app{number}"), parent, 1, manifest)
    assert index.declared_size(Repository("docker.io", "team/app0"), BLOB) == 7
    assert index.declared_size(Repository("docker.io", "team/app255"), BLOB) == 7
    # Upstream is asked for what is beyond the bound.
    assert index.declared_size(Repository("docker.io", "team/app256"), BLOB) is None


@pytest.mark.parametrize("order", get_args(ImageOrder))
async def test_a_page_of_images_is_read_in_the_order_of_an_index(index, order):
    with closing(ImageTable(index.path)) as table:
        with traced(table._connection) as statements:
            table.rows(ImageFilter(upstream="docker.io", text="app"), order, "", 100)
        (statement,) = statements
        rows = table._connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
    (step,) = [row[3] for row in rows]
    assert "SCAN temp.image_table USING INDEX image_table_" in step
