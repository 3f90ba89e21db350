"""`BundleReader`: reads a bundle's documents, and verifies and stores its blobs one by one."""

import asyncio
from contextlib import suppress
from pathlib import Path

from proxy.bundle.byte_queue import ByteQueue
from proxy.bundle.facts import BundleFacts, parse_facts
from proxy.bundle.tar import TarReader
from proxy.concurrency import run_in_thread
from proxy.errors import (
    BundleError,
    DigestMismatchError,
    InvalidManifestError,
    NoSpaceError,
)
from proxy.images.store import ImageStore
from proxy.oci import layout, manifest as oci, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import BundleDetails, LayoutImage
from proxy.storage.commit import Committer
from proxy.storage.ingest import Ingest
from proxy.storage.space import Lease, Reservation

# Files that are not part of a layout (docker's `repositories`, a README) are skipped up to this
# many bytes in total, each counted as `MIN_UNKNOWN_SIZE` at least.
MAX_UNKNOWN_SIZE = 64 << 20
MIN_UNKNOWN_SIZE = 4096

_NOT_A_LAYOUT = (
    "not an OCI image layout, the only format that preserves digests: make it with pullcache "
    "export, with skopeo copy … oci-archive:FILE, or with docker save of docker 25 or later"
)


class BundleReader:
    """Reads one bundle from its archive.

    `digests` are the blobs that it contains, `added_blobs` those that were new to the store with
    their sizes, and `images` what its index lists. `details` is what pullcache wrote into the bundle beyond
    the images, such as the manifests that it expects in the store after the import.
    `docker_names` are the names in docker's manifest, by the digest of the image's config. `facts` is what
    the bundle says about the images, if it does.
    """

    def __init__(self, image_store: ImageStore, lease: Lease, directory: Path) -> None:
        self.digests: set[Digest] = set()
        self.added_blobs: dict[Digest, int] = {}
        self.images: list[LayoutImage] = []
        self.details = BundleDetails()
        self.docker_names: dict[Digest, list[str]] = {}
        self.facts: BundleFacts | None = None
        self._documents: dict[str, bytes] = {}
        # Media types of manifests that were announced and have not arrived yet.
        self._announced_manifests: dict[Digest, str] = {}
        self._image_store = image_store
        self._lease = lease
        self._directory = directory
        self._unknown_size = 0

    async def read(self, archive: TarReader) -> None:
        """Read the whole archive.

        Raises `BundleError`, `DigestMismatchError` and `StorageError`.
        """
        while header := await archive.next_file():
            digest = layout.parse_blob_path(header.name)
            if digest in self.digests or header.name in self._documents:
                raise BundleError(f"{header.name} is in the bundle twice")
            if digest:
                self.digests.add(digest)
                await self._import_blob(digest, header.size, archive)
                await self._lease_stored_children(digest)
            elif header.name in layout.LAYOUT_FILES:
                await self._read_document(header, archive)
            else:
                self._unknown_size += max(header.size, MIN_UNKNOWN_SIZE)
                if self._unknown_size > MAX_UNKNOWN_SIZE:
                    raise BundleError(_NOT_A_LAYOUT)
        await run_in_thread(self._image_store.executor, self._parse_documents)

    async def _read_document(self, header: tar.TarHeader, archive: TarReader) -> None:
        if header.size > layout.MAX_DOCUMENT_SIZE:
            raise BundleError(
                f"{header.name} has {header.size} bytes, more than {layout.MAX_DOCUMENT_SIZE}"
            )
        content = b"".join([chunk async for chunk in archive.read_chunks()])
        self._documents[header.name] = content
        if header.name == layout.INDEX_FILE:
            index = await run_in_thread(self._image_store.executor, layout.parse_index, content)
            for image in index:
                self._announced_manifests[image.digest] = image.media_type
                await self._lease_stored_children(image.digest)

    async def _lease_stored_children(self, digest: Digest) -> None:
        """Lease the stored blobs of an announced manifest, so that a delta does not evict its base.

        An archive whose index comes last, as skopeo's, announces nothing.
        """
        queue = [digest]
        while queue:
            digest = queue.pop()
            size = self._image_store.index.blob_size(digest)
            if size is None:
                continue
            self._lease.digests.add(digest)
            media_type = self._announced_manifests.pop(digest, "")
            if not media_type or size > oci.MAX_MANIFEST_SIZE:
                continue
            content = await self._image_store.blob_store.read(digest)
            with suppress(InvalidManifestError):  # reported when the image is added
                manifest = await run_in_thread(
                    self._image_store.executor, oci.parse_manifest, content or b"", media_type
                )
                for child in manifest.manifests:
                    if child.digest not in self._lease.digests:
                        self._announced_manifests[child.digest] = child.media_type
                queue += [child.digest for child in manifest.children]

    def _parse_documents(self) -> None:
        documents = self._documents
        if layout.INDEX_FILE not in documents:
            raise BundleError(_NOT_A_LAYOUT)
        if layout.LAYOUT_FILE in documents:
            layout.check_layout(documents[layout.LAYOUT_FILE])
        self.images = layout.parse_index(documents[layout.INDEX_FILE])
        if not self.images:
            raise BundleError("the bundle lists no images")
        if layout.EXPECTED_FILE in documents:
            self.details = layout.parse_details(documents[layout.EXPECTED_FILE])
        if layout.DOCKER_MANIFEST_FILE in documents:
            self.docker_names = layout.parse_docker_manifest(documents[layout.DOCKER_MANIFEST_FILE])
        if layout.FACTS_FILE in documents:
            self.facts = parse_facts(documents[layout.FACTS_FILE])

    async def _import_blob(self, digest: Digest, size: int, archive: TarReader) -> None:
        """Store a blob, unless it is stored already: then the archive skips it."""
        stored_size = self._image_store.index.blob_size(digest)
        if stored_size is not None:
            opened = await self._image_store.space.open_blob(digest, stored_size)
            if opened:
                with opened:
                    if stored_size != size:
                        raise BundleError(f"{digest} has {stored_size} bytes, {size} in the bundle")
                self._lease.digests.add(digest)
                self._image_store.index.touch(digest)
                return
        reservation = await self._image_store.space.reserve(size)
        if reservation is None:
            space, imported = self._image_store.space, sum(self.added_blobs.values())
            pins = (
                f", of which pinned images hold {space.pinned_bytes}" if space.pinned_bytes else ""
            )
            raise NoSpaceError(
                f"the bundle does not fit: {size} more bytes are needed after {imported} imported; "
                f"the store holds at most {space.max_size} (store.max_size){pins}"
            )
        try:
            await self._write_blob(digest, size, archive, reservation)
        finally:
            self._image_store.space.release(reservation)

    async def _write_blob(
        self, digest: Digest, size: int, archive: TarReader, reservation: Reservation
    ) -> None:
        ingest = await run_in_thread(
            self._image_store.executor,
            self._image_store.blob_store.open_ingest,
            digest,
            self._directory,
        )
        try:
            await run_in_thread(self._image_store.executor, ingest.preallocate, size)
            reservation.written = size
            await self._copy_to_ingest(archive, ingest)
            await self._commit(ingest, reservation)
        except BaseException:
            await run_in_thread(self._image_store.executor, ingest.discard)
            raise
        finally:
            ingest.close()

    async def _copy_to_ingest(self, archive: TarReader, ingest: Ingest) -> None:
        """Write, hash and verify a blob; one chunk is written while the next is decompressed."""
        queue = ByteQueue()
        writing = asyncio.gather(self._write_chunks(queue, ingest), return_exceptions=True)
        try:
            async for chunk in archive.read_chunks():
                if not await queue.put(chunk):
                    break
        finally:
            queue.close()
            (error,) = await writing
        if error is not None:
            raise error
        if not ingest.matches_digest():
            raise DigestMismatchError(f"the bundle has content that does not match {ingest.digest}")

    async def _write_chunks(self, queue: ByteQueue, ingest: Ingest) -> None:
        try:
            while chunks := await queue.get_batch():
                await run_in_thread(self._image_store.executor, ingest.append, chunks)
        finally:
            queue.close()

    async def _commit(self, ingest: Ingest, reservation: Reservation) -> None:
        """Add the blob to the store, linked to no repository yet."""
        self._lease.digests.add(ingest.digest)
        store = self._image_store
        committer = Committer(store.blob_store, store.index, store.space, store.executor)
        if await committer.commit_ingest(ingest, reservation, None):
            self.added_blobs[ingest.digest] = ingest.frontier
