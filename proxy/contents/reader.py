"""Says what is in an image: from what was read before, an attached SBOM, or its layers."""

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec

from proxy.concurrency import SingleFlight, run_in_thread
from proxy.contents.image_contents import (
    NOT_ASKED,
    ImageContents,
    SbomOrigin,
    distinct,
    from_layers,
    from_sbom,
)
from proxy.contents.layers.layer_contents import READER_VERSION, LayerContents
from proxy.contents.process import ContentsWorker
from proxy.contents.sboms.attached import MAX_ATTACHED_SBOMS, AttachedDocument, find_documents
from proxy.contents.sboms.fetcher import SbomFetcher, SbomSearch
from proxy.contents.sboms.reader import MAX_SBOM_SIZE, SbomContents
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
# Seconds after which upstream is asked again for an SBOM that it could not send.
REFETCH_INTERVAL = 600.0

log = get_logger(__name__)


class ImageTarget(NamedTuple):
    """A manifest of an image for one platform, and the stored SBOMs that are attached to it.

    `layers` are from the lowest; `incomplete` says what the store lacks of them. `search` says where
    more SBOMs may be.
    """

    name: str
    repository: Repository
    reference: Reference
    digest: Digest
    platform: str
    layers: tuple[Descriptor, ...]
    sizes: dict[Digest, int]
    sboms: tuple[AttachedDocument, ...]
    subjects: frozenset[str]
    search: SbomSearch
    incomplete: str


@dataclass(frozen=True, slots=True)
class ContentsReader:
    """Reads images of one store, one at a time. `is_off` forbids to read, not to say what was read."""

    image_store: ImageStore
    records: ContentsRecords
    worker: ContentsWorker
    sbom_fetcher: SbomFetcher
    flights: SingleFlight[tuple[Digest, bool], ImageContents]
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

    async def read(self, target: ImageTarget, *, fetches: bool = True) -> ImageContents:
        """Return what is in a manifest, read if it was not. Raises what `contents` raises.

        If it `fetches`, upstream is asked for attached SBOMs, unless one is stored.
        """
        known = await self.known(target.digest)
        if known is not None and not (fetches and self._is_worth_fetching(known)):
            return known
        if self.is_off:
            raise DeniedError(
                f'{target.name[:80]} was not read, and contents.scan = "off" forbids to read it'
            )
        return await self.flights.run(
            (target.digest, fetches), lambda: self._read_now(target, fetches=fetches)
        )

    def _is_worth_fetching(self, known: ImageContents) -> bool:
        """Tell whether upstream may have an SBOM that it was not asked for, or could not send then."""
        if self.is_off or not known.not_fetched:
            return False
        age = self.clock() - known.read
        return known.not_fetched == NOT_ASKED or not 0 <= age < REFETCH_INTERVAL

    async def _read_now(self, target: ImageTarget, *, fetches: bool) -> ImageContents:
        contents, problems = await self._read_sboms(target.sboms, target)
        not_fetched = NOT_ASKED
        if contents is None and fetches:
            not_fetched = await self.sbom_fetcher.fetch(target.search)
            tried = {document.digest for document in target.sboms}
            fetched = [one for one in await self._find_sboms(target) if one.digest not in tried]
            contents, more = await self._read_sboms(fetched, target)
            problems += more
        if contents is None:
            contents = msgspec.structs.replace(
                await self._read_layers(target), not_fetched=not_fetched
            )
        if problems:
            problems += contents.problems
            contents = msgspec.structs.replace(contents, problems=problems)
        if not target.incomplete:
            packages = [PackageRow(*one) for one in distinct(contents.packages)]
            document = await self._in_thread(msgspec.json.encode, contents)
            with suppress(StorageError):  # then it is read again
                await self.records.put_image(
                    target.digest, target.platform, READER_VERSION, document, packages
                )
        return contents

    # Attached SBOMs.

    async def _find_sboms(self, target: ImageTarget) -> Sequence[AttachedDocument]:
        """Return the SBOMs of a manifest that are stored now."""
        for one in await self.targets(target.repository, target.reference):
            if one.digest == target.digest:
                return one.sboms
        return ()

    async def _read_sboms(
        self, documents: Iterable[AttachedDocument], target: ImageTarget
    ) -> tuple[ImageContents | None, list[str]]:
        """Return what the first SBOM lists that can be read, and why those before it were not taken."""
        problems = []
        for document in documents:
            try:
                sbom = await self._read_sbom(document, target)
            except (ContentsError, StorageError) as error:
                if self.worker.is_closing:
                    raise
                digest = str(document.digest)
                log.info("sbom_not_read", digest=digest, reason=str(error))
                problems.append(f"the attached SBOM {digest[:19]} was not taken: {error}"[:300])
                continue
            if sbom:
                origin = SbomOrigin(str(document.manifest), str(document.digest), sbom.format)
                return from_sbom(sbom, origin, int(self.clock())), problems
        return None, problems

    async def _read_sbom(
        self, document: AttachedDocument, target: ImageTarget
    ) -> SbomContents | None:
        """Return an SBOM; None if it is not stored any more. Raises `ContentsError` and `StorageError`."""
        blob = self.image_store.blob_store.open
        opened = await self._in_thread(blob, document.digest, document.size)
        if opened is None:
            return None
        with opened:
            answer = await self.worker.read("sbom", opened)
        sbom = answer.sbom
        if sbom is None:
            raise ContentsError(answer.problem or "it could not be read")
        if sbom.subjects and target.subjects.isdisjoint(sbom.subjects):
            raise ContentsError("it is about another image")
        if not sbom.packages:
            raise ContentsError("it lists no packages")
        return sbom

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
        return [
            self._to_target(queries, repository, reference, tree, node, is_only=len(nodes) == 1)
            for node in nodes
        ]

    def _to_target(
        self,
        queries: ImageQueries,
        repository: Repository,
        reference: Reference,
        tree: ManifestNode,
        node: ManifestNode,
        *,
        is_only: bool,
    ) -> ImageTarget:
        assert node.manifest
        subjects = [node.digest, tree.digest] if is_only else [node.digest]
        subjects = list(dict.fromkeys(subjects))
        attestations = _attestations(tree, node)
        attached = [
            StoredBlob(child.digest, child.stored[child.digest], None, 0)
            for child in tree.walk()
            if child.digest in child.stored and child.digest in attestations
        ]
        for subject in subjects:
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
            display_name(repository, reference),
            repository,
            reference,
            node.digest,
            str(node.platform or ""),
            node.manifest.layers,
            node.stored,
            tuple(documents.values())[:MAX_ATTACHED_SBOMS],
            frozenset({node.digest.hex, tree.digest.hex}),
            SbomSearch(repository, tuple(subjects), tuple(attestations)),
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


def _attestations(tree: ManifestNode, node: ManifestNode) -> dict[Digest, None]:
    """Return the children of indexes that attest a manifest, in their order."""
    return dict.fromkeys(
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
