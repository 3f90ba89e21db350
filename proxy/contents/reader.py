"""Says what is in an image: from what was read before, an attached SBOM, or its layers."""

from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec

from proxy.concurrency import SingleFlight, run_in_thread
from proxy.contents.attached import MAX_ATTACHED_SBOMS, AttachedDocument, find_documents
from proxy.contents.image_contents import (
    ImageContents,
    SbomOrigin,
    distinct,
    from_layers,
    from_sbom,
)
from proxy.contents.layer_contents import READER_VERSION, LayerContents
from proxy.contents.process import ContentsWorker
from proxy.contents.sbom_reader import MAX_SBOM_SIZE, SbomContents
from proxy.errors import (
    ContentsError,
    DeniedError,
    StorageError,
    UnknownManifestError,
)
from proxy.images.manage import name_matches
from proxy.images.store import ImageStore
from proxy.images.tree import ManifestNode, build_tree
from proxy.log import get_logger
from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import MAX_MANIFEST_SIZE, Descriptor
from proxy.oci.platform import Platform, choose_platform, parse_platform
from proxy.oci.reference import Reference, Repository, parse_image
from proxy.storage.image_queries import ImageQueries, ImageRow, StoredBlob
from proxy.storage.records.contents import ContentsRecords
from proxy.storage.records.contents_rows import PackageRow

R = TypeVar("R")

# Images that one query reads.
_BATCH_SIZE = 20

log = get_logger(__name__)


class ImageTarget(NamedTuple):
    """A manifest of an image for one platform, and the SBOMs that are attached to it.

    `layers` are from the lowest; `incomplete` says what the store lacks of them.
    """

    name: str
    repository: Repository
    digest: Digest
    platform: str
    layers: tuple[Descriptor, ...]
    sizes: dict[Digest, int]
    sboms: tuple[AttachedDocument, ...]
    subjects: frozenset[str]
    incomplete: str


@dataclass(frozen=True, slots=True)
class ContentsReader:
    """Reads images of one store, one at a time. `is_off` forbids to read, not to say what was read."""

    image_store: ImageStore
    records: ContentsRecords
    worker: ContentsWorker
    flights: SingleFlight[Digest, ImageContents]
    native_platform: Platform
    clock: Callable[[], float]
    is_off: bool

    async def contents(self, image: str, platform: str = "") -> tuple[ImageTarget, ImageContents]:
        """Return what is in a stored image for a platform, by default the one of this machine.

        Raises `UnknownManifestError` if it is not stored, or not for that platform, `ContentsError`,
        `DeniedError` if reading is off, `InvalidReferenceError` and `StorageError`.
        """
        target = await self.find(image, platform)
        return target, await self.read(target)

    async def find(self, image: str, platform: str = "") -> ImageTarget:
        """Return the manifest of an image for a platform. Raises what `contents` raises."""
        wanted = parse_platform(platform) if platform else None
        repository, reference = self.image_store.names.to_repository(parse_image(image))
        targets = await self.targets(repository, reference)
        if not targets:
            raise UnknownManifestError(
                f"{image[:100]} is not in the store; pullcache images lists stored images"
            )
        candidates = [(_to_platform(one.platform), one) for one in targets]
        chosen = choose_platform(candidates, wanted or self.native_platform)
        if chosen is None and wanted:
            raise UnknownManifestError(
                f"{image[:100]} is not in the store for {platform}, only for"
                f" {', '.join(one.platform or '?' for one in targets)[:80]}"
            )
        return chosen or targets[0]

    async def targets(self, repository: Repository, reference: Reference) -> list[ImageTarget]:
        """Return the stored manifests of an image, one for each platform. Raises `StorageError`."""
        return await self.image_store.query(
            lambda queries: self._find_targets(queries, repository, reference)
        )

    async def all_targets(self, pattern: str = "") -> AsyncGenerator[ImageTarget, None]:
        """Yield the stored manifests of the images that match a part of a name or a glob.

        Raises `StorageError`.
        """
        after: ImageRow | None = None
        while True:
            rows = await self.image_store.query(partial(_next_images, pattern, after))
            for row in rows:
                for target in await self.targets(row.repository, row.reference):
                    yield target
            if len(rows) < _BATCH_SIZE:
                return
            after = rows[-1]

    async def known(self, digest: Digest) -> ImageContents | None:
        """Return what was read of a manifest before. Raises `StorageError`."""
        document = await self.records.image(digest, READER_VERSION)
        if document is None:
            return None
        with suppress(msgspec.MsgspecError):
            return await self._in_thread(_decode_image, document)
        return None

    async def known_of(self, target: ImageTarget) -> ImageContents | None:
        """Return what was read of a manifest before. Raises `StorageError`."""
        return await self.known(target.digest)

    async def read(self, target: ImageTarget) -> ImageContents:
        """Return what is in a manifest, read if it was not. Raises what `contents` raises."""
        known = await self.known(target.digest)
        if known is not None:
            return known
        if self.is_off:
            raise DeniedError(
                f'{target.name[:80]} was not read, and contents.scan = "off" forbids to read it'
            )
        return await self.flights.run(target.digest, lambda: self._read_now(target))

    async def _read_now(self, target: ImageTarget) -> ImageContents:
        contents = await self._read_sboms(target) or await self._read_layers(target)
        if not target.incomplete:
            packages = [PackageRow(*one) for one in distinct(contents.packages)]
            document = await self._in_thread(msgspec.json.encode, contents)
            with suppress(StorageError):  # then it is read again
                await self.records.put_image(
                    target.digest, target.platform, READER_VERSION, document, packages
                )
        return contents

    # Attached SBOMs.

    async def _read_sboms(self, target: ImageTarget) -> ImageContents | None:
        """Return what the first attached SBOM lists that can be read; None if there is none."""
        for document in target.sboms:
            sbom = await self._read_sbom(document)
            if sbom is None or not sbom.packages:
                continue
            if sbom.subjects and target.subjects.isdisjoint(sbom.subjects):
                continue  # of another image
            origin = SbomOrigin(str(document.manifest), str(document.digest), sbom.format)
            return from_sbom(sbom, origin, int(self.clock()))
        return None

    async def _read_sbom(self, document: AttachedDocument) -> SbomContents | None:
        blob = self.image_store.blob_store.open
        opened = await self._in_thread(blob, document.digest, document.size)
        if opened is None:
            return None
        with opened:
            answer = await self.worker.read("sbom", opened)
        if answer.problem:
            log.info("sbom_not_read", digest=str(document.digest), reason=answer.problem)
        return answer.sbom

    # Layers.

    async def _read_layers(self, target: ImageTarget) -> ImageContents:
        if not any(map(_is_file_system, target.layers)):
            return ImageContents(source="none", read=int(self.clock()))
        layers = [
            await self._read_layer(layer, target.sizes.get(layer.digest)) for layer in target.layers
        ]
        return await self._in_thread(from_layers, layers, int(self.clock()))

    async def _read_layer(self, layer: Descriptor, size: int | None) -> LayerContents:
        if not _is_file_system(layer):
            return LayerContents(problem=f"{layer.media_type[:60]} is not read")
        if size is None:
            return LayerContents(problem="it is not in the store, and was not read")
        known = await self.records.layer(layer.digest, READER_VERSION)
        if known is not None:
            with suppress(msgspec.MsgspecError):
                return await self._in_thread(_decode_layer, known)
        opened = await self.image_store.space.open_blob(layer.digest, size)
        if opened is None:
            return LayerContents(problem="it is not in the store, and was not read")
        try:
            with opened:
                answer = await self.worker.read("layer", opened)
        except ContentsError as error:
            if self.worker.is_closing:
                raise
            return LayerContents(problem=str(error))
        contents = answer.layer or LayerContents(problem=answer.problem)
        document = await self._in_thread(msgspec.json.encode, contents)
        with suppress(StorageError):  # then it is read again
            await self.records.put_layer(layer.digest, READER_VERSION, document)
        return contents

    async def _in_thread(self, work: Callable[..., R], *args: object) -> R:
        return await run_in_thread(self.image_store.executor, work, *args)

    # The methods below run in a thread.

    def _find_targets(
        self, queries: ImageQueries, repository: Repository, reference: Reference
    ) -> list[ImageTarget]:
        rows = queries.find_images(repository, reference)
        digest = rows[0].digest if rows else reference
        top = queries.blob(repository, digest) if isinstance(digest, Digest) else None
        if top is None:
            return []
        tree = build_tree(self.image_store, queries, top, repository)
        nodes = [node for node in tree.platform_manifests() if node.manifest]
        name = display_name(repository, reference)
        return [
            self._to_target(queries, repository, name, tree, node, is_only=len(nodes) == 1)
            for node in nodes
        ]

    def _to_target(
        self,
        queries: ImageQueries,
        repository: Repository,
        name: str,
        tree: ManifestNode,
        node: ManifestNode,
        *,
        is_only: bool,
    ) -> ImageTarget:
        assert node.manifest
        subjects = [node.digest, tree.digest] if is_only else [node.digest]
        attached = [
            StoredBlob(child.digest, child.stored[child.digest], None, 0)
            for child in tree.walk()
            if child.digest in child.stored and child.digest in _attestations(tree, node)
        ]
        for subject in dict.fromkeys(subjects):
            attached += queries.referrers(repository, subject)
            attached += [blob for _, blob in queries.tagged_referrers(repository, subject)]
        documents = {
            document.digest: document
            for blob in attached
            for document in self._documents(blob)
            if document.size <= MAX_SBOM_SIZE
            and queries.stored_sizes([document.digest], repository)
        }
        missing = [layer for layer in node.manifest.layers if layer.digest not in node.stored]
        return ImageTarget(
            name,
            repository,
            node.digest,
            str(node.platform or ""),
            node.manifest.layers,
            node.stored,
            tuple(documents.values())[:MAX_ATTACHED_SBOMS],
            frozenset({node.digest.hex, tree.digest.hex}),
            f"{len(missing)} of {len(node.manifest.layers)} layers are not in the store"
            if missing
            else "",
        )

    def _documents(self, blob: StoredBlob) -> list[AttachedDocument]:
        if blob.size > MAX_MANIFEST_SIZE:
            return []
        content = self.image_store.blob_store.read_sync(blob.digest, blob.size)
        return list(find_documents(blob.digest, content)) if content else []


def _next_images(pattern: str, after: ImageRow | None, queries: ImageQueries) -> list[ImageRow]:
    """Return the next images that match, without those whose content is not stored."""
    start = (after.repository, after.reference) if after else None
    rows = (
        row for row in queries.images(pattern, start) if row.digest and name_matches(row, pattern)
    )
    return list(islice(rows, _BATCH_SIZE))


def _attestations(tree: ManifestNode, node: ManifestNode) -> frozenset[Digest]:
    """Return the children of indexes that attest a manifest."""
    return frozenset(
        child.digest
        for index in tree.walk()
        if index.manifest
        for child in index.manifest.manifests
        if child.attested == node.digest
    )


def _is_file_system(layer: Descriptor) -> bool:
    """Tell whether a layer is an archive of files, in docker's media types or OCI's."""
    kind = layer.media_type.lower()
    is_layer = "image.layer" in kind or "image.rootfs" in kind
    return is_layer and "tar" in kind and "encrypted" not in kind


def _to_platform(text: str) -> Platform | None:
    return parse_platform(text) if text else None


def _decode_image(document: bytes) -> ImageContents:
    return msgspec.json.decode(document, type=ImageContents)


def _decode_layer(document: bytes) -> LayerContents:
    return msgspec.json.decode(document, type=LayerContents)
