"""What comes out of a bundle: its documents, and its blobs, verified and committed one by one."""

import asyncio
from contextlib import suppress
from pathlib import Path

from proxy.bundle.arrivals import Arrivals
from proxy.bundle.tar import TarStream
from proxy.concurrency import in_thread, to_the_end
from proxy.errors import (
    BundleError,
    DigestMismatchError,
    InvalidManifestError,
    NoSpaceError,
    StorageError,
)
from proxy.images.tree import Contents
from proxy.oci import layout, manifest as oci, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import Listed
from proxy.storage.ingest import Ingest
from proxy.storage.space import Hold, Reservation

# What is in a bundle and no part of a layout (docker's `repositories`, a README) is read over.
MAX_EXTRAS = 64 << 20

_NOT_A_LAYOUT = (
    "not an OCI image layout, the one format that keeps digests: make it with pullcache export, with "
    "skopeo copy … oci-archive:FILE, or with docker save of docker 25 or later"
)


class Intake:
    """Reads one bundle.

    `seen` are the blobs that it has, `added` those that the store had not, `images` what it lists;
    `meant` are the manifests of an index that are to be here, if it says so; `docker_names` are what docker's manifest calls an image, by the digest of its config.
    """

    def __init__(self, contents: Contents, hold: Hold, folder: Path) -> None:
        self.seen: set[Digest] = set()
        self.added: dict[Digest, int] = {}
        self.images: list[Listed] = []
        self.meant: dict[Digest, list[Digest]] = {}
        self.docker_names: dict[Digest, list[str]] = {}
        self._documents: dict[str, bytes] = {}
        # Manifests that were named and are not here yet, with their media types.
        self._announced: dict[Digest, str] = {}
        self._contents = contents
        self._hold = hold
        self._folder = folder
        self._extras = 0

    async def read(self, stream: TarStream) -> None:
        """Take everything in. Raises `BundleError`, `DigestMismatchError` and `StorageError`."""
        while header := await stream.next_file():
            digest = layout.parse_path(header.name)
            if digest in self.seen or header.name in self._documents:
                raise BundleError(f"{header.name} is in the bundle twice")
            if digest:
                self.seen.add(digest)
                await self._blob(digest, header.size, stream)
                await self._look_ahead(digest)
            elif header.name in layout.DOCUMENTS:
                await self._document(header, stream)
            else:
                self._extras += header.size
                if self._extras > MAX_EXTRAS:
                    raise BundleError(_NOT_A_LAYOUT)
        self._parse()

    async def _document(self, header: tar.Header, stream: TarStream) -> None:
        if header.size > layout.MAX_DOCUMENT_SIZE:
            raise BundleError(f"{header.name} has {header.size} bytes, too many to read")
        content = b"".join([piece async for piece in stream.pieces()])
        self._documents[header.name] = content
        if header.name == layout.INDEX:
            for image in layout.parse_index(content):
                self._announced[image.digest] = image.media_type
                await self._look_ahead(image.digest)

    async def _look_ahead(self, digest: Digest) -> None:
        """Hold what an announced manifest names and the store has: a delta evicts nothing it rests on.

        Of an archive whose index comes last nothing is announced.
        """
        waiting = [digest]
        while waiting:
            digest = waiting.pop()
            size = self._contents.index.size(digest)
            if size is None:
                continue
            self._hold.digests.add(digest)
            media_type = self._announced.pop(digest, "")
            if not media_type or size > oci.MAX_MANIFEST_SIZE:
                continue
            content = await self._contents.store.read(digest)
            with suppress(InvalidManifestError):  # whoever enters the image says why
                manifest = oci.parse(content or b"", media_type)
                for child in manifest.children:
                    if manifest.is_index and child.digest not in self._hold.digests:
                        self._announced[child.digest] = child.media_type
                    waiting.append(child.digest)

    def _parse(self) -> None:
        if layout.INDEX not in self._documents:
            raise BundleError(_NOT_A_LAYOUT)
        if layout.LAYOUT in self._documents:
            layout.check_layout(self._documents[layout.LAYOUT])
        self.images = layout.parse_index(self._documents[layout.INDEX])
        if not self.images:
            raise BundleError("the bundle lists no image")
        if layout.MEANT in self._documents:
            self.meant = layout.parse_meant(self._documents[layout.MEANT])
        if layout.DOCKER in self._documents:
            self.docker_names = layout.parse_docker(self._documents[layout.DOCKER])

    async def _blob(self, digest: Digest, size: int, stream: TarStream) -> None:
        """Take a blob in, unless it is here; then the stream reads over it."""
        known = self._contents.index.size(digest)
        if known is not None:
            opened = await self._contents.space.open_blob(digest, known)
            if opened:
                with opened:
                    if known != size:
                        raise BundleError(f"{digest} has {known} bytes, {size} in the bundle")
                self._hold.digests.add(digest)
                self._contents.index.touch(digest)
                return
        reservation = await self._contents.space.reserve(size)
        if reservation is None:
            space, brought = self._contents.space, sum(self.added.values())
            pins = f", of which pinned images hold {space.pinned}" if space.pinned else ""
            raise NoSpaceError(
                f"the bundle does not fit: {size} bytes more than the {brought} it has brought; "
                f"the store holds at most {space.max_size} (store.max_size){pins}"
            )
        try:
            await self._fill(digest, size, stream, reservation)
        finally:
            self._contents.space.release(reservation)

    async def _fill(
        self, digest: Digest, size: int, stream: TarStream, reservation: Reservation
    ) -> None:
        ingest = await in_thread(
            self._contents.threads, self._contents.store.open_ingest, digest, self._folder
        )
        try:
            await in_thread(self._contents.threads, ingest.preallocate, size)
            reservation.written = size
            await self._pump(stream, ingest)
            await to_the_end(self._commit(ingest, reservation))
        except BaseException:
            await in_thread(self._contents.threads, ingest.discard)
            raise
        finally:
            ingest.close()

    async def _pump(self, stream: TarStream, ingest: Ingest) -> None:
        """Write and hash what comes, while more of it is read and decompressed, and verify it."""
        arrivals = Arrivals()
        writing = asyncio.gather(self._write(arrivals, ingest), return_exceptions=True)
        try:
            async for piece in stream.pieces():
                if not await arrivals.put(piece):
                    break
        finally:
            arrivals.close()
            (outcome,) = await writing
        if outcome is not None:
            raise outcome
        if not ingest.is_right():
            raise DigestMismatchError(f"the bundle holds other content for {ingest.digest}")

    async def _write(self, arrivals: Arrivals, ingest: Ingest) -> None:
        try:
            while chunks := await arrivals.take():
                await in_thread(self._contents.threads, _append, ingest, chunks)
        finally:
            arrivals.close()

    async def _commit(self, ingest: Ingest, reservation: Reservation) -> None:
        """Make the blob a part of the store that no repository is linked to."""
        digest, size = ingest.digest, ingest.frontier
        self._hold.digests.add(digest)
        await in_thread(self._contents.threads, ingest.commit)
        try:
            is_new = await self._contents.index.add_blob(None, digest, size)
        except StorageError:
            await in_thread(self._contents.threads, self._contents.store.delete, digest)
            raise
        self._contents.space.commit(reservation, digest, size, is_new=is_new)
        if is_new:
            self.added[digest] = size
        await in_thread(self._contents.threads, ingest.settle)


def _append(ingest: Ingest, chunks: list[bytes]) -> None:
    ingest.append(chunks)
    ingest.write_back()
