"""Comparing the index with the files of the blobs, in both directions, a batch at a time."""

import asyncio
from collections.abc import Iterable
from itertools import islice

from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index

# Blobs and files compared in a batch, which takes 30 ms in a thread. A larger store takes several batches.
BATCH_SIZE = 4096
# Blobs and files per query of the index in the event loop, and per call in a thread.
_SLICE_SIZE = 256


class Reconciler:
    """Compares index and files, round after round. A commit or removal in progress may cause a difference.

    The first round finds the differences that a kill has left, such as rows of deleted files.
    """

    def __init__(self, store: BlobStore, index: Index) -> None:
        self._store = store
        self._index = index
        self._last_row = ""
        self.is_first_round = True
        self._files = store.iter_blobs()

    @property
    def is_at_start(self) -> bool:
        """Whether the next batch is the first one of a round through the index."""
        return not self._last_row

    async def find_missing(self) -> list[Digest]:
        """Return blobs of the next batch that have no file of their size. Raises `StorageError`."""
        missing: list[Digest] = []
        for _ in range(BATCH_SIZE // _SLICE_SIZE):
            rows = self._index.blobs_after(self._last_row, _SLICE_SIZE)
            missing += await asyncio.to_thread(self._without_file, rows)
            self._last_row = str(rows[-1][0]) if len(rows) == _SLICE_SIZE else ""
            if not self._last_row:
                break
        return missing

    async def find_unknown(self) -> list[Digest]:
        """Return blobs of the next batch of files that are not in the index. Raises `StorageError`."""
        unknown: list[Digest] = []
        for _ in range(BATCH_SIZE // _SLICE_SIZE):
            digests = await asyncio.to_thread(self._next_files)
            unknown += self._index.unknown_blobs(digests)
            if len(digests) < _SLICE_SIZE:
                self._files = self._store.iter_blobs()
                self.is_first_round &= not self.is_at_start
                break
        return unknown

    def _next_files(self) -> list[Digest]:
        try:
            return [digest for digest, _ in islice(self._files, _SLICE_SIZE)]
        except OSError as error:
            raise StorageError(f"the store cannot be read: {error}") from error

    def _without_file(self, rows: Iterable[tuple[Digest, int]]) -> list[Digest]:
        return [digest for digest, size in rows if not self._has_file(digest, size)]

    def _has_file(self, digest: Digest, size: int) -> bool:
        try:
            opened = self._store.open(digest, size)
        except StorageError:
            return True  # it may exist
        if opened:
            opened.close()
        return opened is not None
