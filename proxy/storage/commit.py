"""The only way to add content to the store: it becomes durable, visible, indexed and counted.

A commit that fails removes the file again, unless the blob had a file before.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Protocol

from proxy.concurrency import run_in_thread, run_uncancelled
from proxy.errors import StorageError
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Repository
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.ingest import Ingest
from proxy.storage.space import Reservation, SpaceManager


class _IndexWrite(Protocol):
    async def __call__(self, *, on_commit: Callable[[], None]) -> bool: ...


class Committer:
    """Commits blobs and manifests of one store.

    A commit waits while another commit or a removal of the same digest runs. It is not cancelled
    halfway. On success the reservation is spent; on failure it remains the caller's.
    """

    def __init__(
        self, store: BlobStore, index: Index, space: SpaceManager, executor: Executor
    ) -> None:
        self._store = store
        self._index = index
        self._space = space
        self._executor = executor

    async def commit_ingest(
        self, ingest: Ingest, reservation: Reservation, repository: Repository | None
    ) -> bool:
        """Commit an ingest whose bytes up to the frontier are verified, and link the repository to it.

        Return whether the blob is new. Raises `StorageError`; the caller then discards the ingest.
        """
        return await run_uncancelled(
            self._commit(
                ingest.digest,
                ingest.frontier,
                reservation,
                write=ingest.commit,
                add_to_index=partial(
                    self._index.add_blob, repository, ingest.digest, ingest.frontier
                ),
                settle=ingest.delete_state,
            )
        )

    async def commit_manifest(
        self,
        repository: Repository,
        digest: Digest,
        content: bytes,
        manifest: Manifest,
        reservation: Reservation,
    ) -> bool:
        """Commit a manifest, parsed from `content`, and link the repository to it.

        Return whether it is new. Raises `StorageError`.
        """
        return await run_uncancelled(
            self._commit(
                digest,
                len(content),
                reservation,
                write=partial(self._store.commit_bytes, digest, content),
                add_to_index=partial(
                    self._index.add_manifest, repository, digest, len(content), manifest
                ),
                settle=partial(self._store.settle_bytes, digest),
            )
        )

    async def _commit(
        self,
        digest: Digest,
        size: int,
        reservation: Reservation,
        *,
        write: Callable[[], None],
        add_to_index: _IndexWrite,
        settle: Callable[[], None],
    ) -> bool:
        async with self._space.locks.hold(digest):
            was_stored = self._space.is_stored(digest)
            # A damaged index may not know a file that is intact.
            had_file = was_stored or self._store.committed_at(digest) is not None
            try:
                await run_in_thread(self._executor, write)
                await add_to_index(
                    on_commit=partial(self._space.convert_reservation, reservation, digest)
                )
            except StorageError:
                if not had_file:
                    await self._undo(digest, size)
                await run_in_thread(self._executor, settle)
                raise
            await run_in_thread(self._executor, settle)
            self._space.on_stored([digest])
            return not was_stored

    async def _undo(self, digest: Digest, size: int) -> None:
        """Remove the file if it became visible; count it as a stray if it cannot be removed."""
        try:
            await run_in_thread(self._executor, self._store.delete, digest)
        except StorageError as error:
            self._space.add_stray(digest, size, str(error))
