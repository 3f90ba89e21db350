"""A store and an index in a temporary directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from tests.fakes.clock import Clock


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(tmp_path: Path, clock: Clock) -> Iterator[Index]:
    index = Index(tmp_path / "index.sqlite", clock)
    yield index
    index.close()
