"""What comes out of a bundle: its documents, and its blobs, verified and committed one by one."""

import asyncio
from contextlib import suppress
from pathlib import Path

from proxy.bundle.tar import TarReader
from proxy.concurrency import run_in_thread
from proxy.errors import (
    BundleError,
    DigestMismatchError,
    InvalidManifestError,
    NoSpaceError,
)
from proxy.images.tree import ImageStore
from proxy.oci import layout, manifest as oci, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import LayoutImage
from proxy.storage.commit import Committer
from proxy.storage.ingest import Ingest
from proxy.storage.space import Lease, Reservation

# What is in a bundle and no part of a layout (docker's `repositories`, a README) is read over.
MAX_UNKNOWN_SIZE = 64 << 20

_NOT_A_LAYOUT = (
    "not an OCI image layout, the one format that keeps digests: make it with pullcache export, with "
    "skopeo copy … oci-archive:FILE, or with docker save of docker 25 or later"
)


# A thread call costs about as much as hashing 100 KiB; this much makes it worth its price.
QUEUE_BATCH_SIZE = 256 << 10
# More than this waits in the kernel: the network is then faster than the disk.
QUEUE_MAX_SIZE = 1 << 20
# How long a slow link may hold up what has arrived, in seconds, for the sake of a larger batch.
QUEUE_MAX_DELAY = 0.005


class ByteQueue:
    """One task puts, another takes.

    The first chunk is handed over at once, for the sake of whoever waits for a first byte; later ones
    as soon as they make a batch, or after `LINGER`.
    """

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._is_closed = False
        self._is_first = True
        self._not_empty = asyncio.Event()
        self._batch_ready = asyncio.Event()
        self._not_full = asyncio.Event()

    async def put(self, chunk: bytes) -> bool:
        """Add a chunk; wait while there is too much. False if nobody takes any more."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        self._not_empty.set()
        if self._size >= QUEUE_BATCH_SIZE:
            self._batch_ready.set()
        while self._size > QUEUE_MAX_SIZE and not self._is_closed:
            self._not_full.clear()
            await self._not_full.wait()
        return not self._is_closed

    def close(self) -> None:
        """Nothing is added, or taken, any more."""
        self._is_closed = True
        for event in (self._not_empty, self._batch_ready, self._not_full):
            event.set()

    async def get_batch(self) -> list[bytes]:
        """Return what has arrived, at least one chunk; an empty list at the end."""
        await self._not_empty.wait()
        if not self._is_first and not self._batch_ready.is_set():
            timer = asyncio.get_running_loop().call_later(QUEUE_MAX_DELAY, self._batch_ready.set)
            await self._batch_ready.wait()
            timer.cancel()
        self._is_first = False
        chunks, self._chunks, self._size = self._chunks, [], 0
        if not self._is_closed:
            self._not_empty.clear()
            self._batch_ready.clear()
        self._not_full.set()
        return chunks


class BundleReader:
    """Reads one bundle.

    `seen` are the blobs that it has, `added` those that the store had not, `images` what it lists;
    `meant` are the manifests of an index that are to be here, if it says so; `docker_names` are what docker's manifest calls an image, by the digest of its config.
    """

    def __init__(self, image_store: ImageStore, lease: Lease, folder: Path) -> None:
        self.digests: set[Digest] = set()
        self.added_blobs: dict[Digest, int] = {}
        self.images: list[LayoutImage] = []
        self.expected_manifests: dict[Digest, list[Digest]] = {}
        self.docker_names: dict[Digest, list[str]] = {}
        self._documents: dict[str, bytes] = {}
        # Manifests that were named and are not here yet, with their media types.
        self._expected_media_types: dict[Digest, str] = {}
        self._image_store = image_store
        self._lease = lease
        self._folder = folder
        self._unknown_size = 0

    async def read(self, stream: TarReader) -> None:
        """Take everything in. Raises `BundleError`, `DigestMismatchError` and `StorageError`."""
        while header := await stream.next_file():
            digest = layout.parse_blob_path(header.name)
            if digest in self.digests or header.name in self._documents:
                raise BundleError(f"{header.name} is in the bundle twice")
            if digest:
                self.digests.add(digest)
                await self._import_blob(digest, header.size, stream)
                await self._lease_stored_children(digest)
            elif header.name in layout.LAYOUT_FILES:
                await self._read_document(header, stream)
            else:
                self._unknown_size += header.size
                if self._unknown_size > MAX_UNKNOWN_SIZE:
                    raise BundleError(_NOT_A_LAYOUT)
        self._parse_documents()

    async def _read_document(self, header: tar.TarHeader, stream: TarReader) -> None:
        if header.size > layout.MAX_DOCUMENT_SIZE:
            raise BundleError(f"{header.name} has {header.size} bytes, too many to read")
        content = b"".join([piece async for piece in stream.read_chunks()])
        self._documents[header.name] = content
        if header.name == layout.INDEX_FILE:
            for image in layout.parse_index(content):
                self._expected_media_types[image.digest] = image.media_type
                await self._lease_stored_children(image.digest)

    async def _lease_stored_children(self, digest: Digest) -> None:
        """Hold what an announced manifest names and the store has: a delta evicts nothing it rests on.

        Of an archive whose index comes last nothing is announced.
        """
        waiting = [digest]
        while waiting:
            digest = waiting.pop()
            size = self._image_store.index.blob_size(digest)
            if size is None:
                continue
            self._lease.digests.add(digest)
            media_type = self._expected_media_types.pop(digest, "")
            if not media_type or size > oci.MAX_MANIFEST_SIZE:
                continue
            content = await self._image_store.blob_store.read(digest)
            with suppress(InvalidManifestError):  # whoever enters the image says why
                manifest = oci.parse_manifest(content or b"", media_type)
                for child in manifest.children:
                    if manifest.is_index and child.digest not in self._lease.digests:
                        self._expected_media_types[child.digest] = child.media_type
                    waiting.append(child.digest)

    def _parse_documents(self) -> None:
        if layout.INDEX_FILE not in self._documents:
            raise BundleError(_NOT_A_LAYOUT)
        if layout.LAYOUT_FILE in self._documents:
            layout.check_layout(self._documents[layout.LAYOUT_FILE])
        self.images = layout.parse_index(self._documents[layout.INDEX_FILE])
        if not self.images:
            raise BundleError("the bundle lists no image")
        if layout.EXPECTED_FILE in self._documents:
            self.expected_manifests = layout.parse_expected(self._documents[layout.EXPECTED_FILE])
        if layout.DOCKER_MANIFEST_FILE in self._documents:
            self.docker_names = layout.parse_docker_manifest(
                self._documents[layout.DOCKER_MANIFEST_FILE]
            )

    async def _import_blob(self, digest: Digest, size: int, stream: TarReader) -> None:
        """Take a blob in, unless it is here; then the stream reads over it."""
        known = self._image_store.index.blob_size(digest)
        if known is not None:
            opened = await self._image_store.space.open_blob(digest, known)
            if opened:
                with opened:
                    if known != size:
                        raise BundleError(f"{digest} has {known} bytes, {size} in the bundle")
                self._lease.digests.add(digest)
                self._image_store.index.touch(digest)
                return
        reservation = await self._image_store.space.reserve(size)
        if reservation is None:
            space, brought = self._image_store.space, sum(self.added_blobs.values())
            pins = (
                f", of which pinned images hold {space.pinned_bytes}" if space.pinned_bytes else ""
            )
            raise NoSpaceError(
                f"the bundle does not fit: {size} bytes more than the {brought} it has brought; "
                f"the store holds at most {space.max_size} (store.max_size){pins}"
            )
        try:
            await self._write_blob(digest, size, stream, reservation)
        finally:
            self._image_store.space.release(reservation)

    async def _write_blob(
        self, digest: Digest, size: int, stream: TarReader, reservation: Reservation
    ) -> None:
        ingest = await run_in_thread(
            self._image_store.executor,
            self._image_store.blob_store.open_ingest,
            digest,
            self._folder,
        )
        try:
            await run_in_thread(self._image_store.executor, ingest.preallocate, size)
            reservation.written = size
            await self._copy_to_ingest(stream, ingest)
            await self._commit(ingest, reservation)
        except BaseException:
            await run_in_thread(self._image_store.executor, ingest.discard)
            raise
        finally:
            ingest.close()

    async def _copy_to_ingest(self, stream: TarReader, ingest: Ingest) -> None:
        """Write and hash what comes, while more of it is read and decompressed, and verify it."""
        arrivals = ByteQueue()
        writing = asyncio.gather(self._write_chunks(arrivals, ingest), return_exceptions=True)
        try:
            async for piece in stream.read_chunks():
                if not await arrivals.put(piece):
                    break
        finally:
            arrivals.close()
            (outcome,) = await writing
        if outcome is not None:
            raise outcome
        if not ingest.matches_digest():
            raise DigestMismatchError(f"the bundle holds other content for {ingest.digest}")

    async def _write_chunks(self, queue: ByteQueue, ingest: Ingest) -> None:
        try:
            while chunks := await queue.get_batch():
                await run_in_thread(self._image_store.executor, _append_chunks, ingest, chunks)
        finally:
            queue.close()

    async def _commit(self, ingest: Ingest, reservation: Reservation) -> None:
        """Make the blob a part of the store that no repository is linked to."""
        self._lease.digests.add(ingest.digest)
        store = self._image_store
        committer = Committer(store.blob_store, store.index, store.space, store.executor)
        if await committer.commit_ingest(ingest, reservation, None):
            self.added_blobs[ingest.digest] = ingest.frontier


def _append_chunks(ingest: Ingest, chunks: list[bytes]) -> None:
    ingest.append(chunks)
    ingest.start_writeback()
