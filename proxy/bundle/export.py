"""Export a bundle: stored images as a tar of an OCI image layout that `docker load` takes too.

Blobs are copied unchanged and hashed, so that a blob damaged on disk never completes a bundle. The
same images produce the same bytes, and the size is known before the first byte. What is known about the
images, and changes, is in a bundle only if that was asked for.
"""

import asyncio
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from proxy.bundle import local_file
from proxy.bundle.facts import BundledRepository, BundleFacts, ImageAge, encode_facts
from proxy.bundle.local_file import LocalFile
from proxy.bundle.referrers import find_referrers
from proxy.concurrency import read_ahead
from proxy.errors import StorageError, UnknownManifestError
from proxy.images.store import ImageStore
from proxy.images.tree import ManifestNode, load_image
from proxy.images.trust import PolicySummary, describe_policy
from proxy.names import display_name, full_name, policy_name
from proxy.oci import layout, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import BundleDetails, DockerImage, LayoutImage
from proxy.oci.manifest import Manifest
from proxy.oci.platform import Platform, choose_platform, parse_platform
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import ReferrerRecord
from proxy.policy.rules import RuleSet
from proxy.storage.image_queries import ImageQueries
from proxy.storage.records.tag_history import IMPORTED
from proxy.storage.space import Lease

# Small enough that the CPU's cache holds a chunk while one thread reads, hashes and writes it.
READ_SIZE = 256 << 10
# Missing blobs of an image that are fetched at a time.
MAX_FETCHES = 4


class FetchContent(Protocol):
    """Brings missing content of an image into the store, if it can be had without its registry."""

    async def __call__(
        self, repository: Repository, reference: Reference, *, is_manifest: bool
    ) -> bool:
        """Return whether the manifest or blob is in the store now."""


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """An image of a bundle. `skipped_platforms` are in its index but not complete in the store.

    `policy` is what the policies say of it, which does not change the bundle.
    """

    name: str
    digest: str
    platforms: list[str]
    skipped_platforms: list[str]
    policy: PolicySummary | None = None


@dataclass(frozen=True, slots=True)
class _BundleImage:
    repository: Repository
    reference: Reference
    node: ManifestNode
    referrers: tuple["_BundleImage", ...] = ()
    records: Mapping[Digest, ReferrerRecord] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """The name with registry and namespace, as containerd writes it."""
        return full_name(self.repository, self.reference)


class Bundle:
    """The content of a bundle: its blobs in order, with sizes, and the size of the whole tar.

    `facts` is the content of its `pullcache.facts.json`; without any it has none.
    """

    def __init__(
        self, images: Sequence[_BundleImage], exclude: Collection[Digest], facts: bytes = b""
    ) -> None:
        self.blobs = {
            digest: size for digest, size in _order_blobs(images).items() if digest not in exclude
        }
        documents = _documents(images, self.blobs)
        if facts:
            documents[layout.FACTS_FILE] = facts
        self.metadata_entries = b"".join(
            _encode_entry(name, content) for name, content in documents.items()
        )
        self.size = len(self.metadata_entries) + len(tar.END_OF_ARCHIVE)
        for digest, size in self.blobs.items():
            header = tar.encode_header(layout.blob_path(digest), size)
            self.size += len(header) + size + tar.padding_size(size)


class BundleExporter:
    """Exports images of one store. `fetch` is asked for what the store lacks of an image, if there is one."""

    def __init__(
        self,
        image_store: ImageStore,
        rules: RuleSet,
        clock: Callable[[], float],
        fetch: FetchContent | None = None,
    ) -> None:
        self._image_store = image_store
        self._fetch = fetch
        self._rules = rules
        self._clock = clock

    @asynccontextmanager
    async def open_bundle(
        self,
        images: Iterable[str],
        *,
        platforms: Sequence[str] = (),
        exclude: Collection[Digest] = (),
        with_facts: bool = False,
    ) -> AsyncIterator[tuple[Bundle, list[ExportedImage]]]:
        """Yield the bundle of the images, which are not evicted within the context.

        Of an image index, the bundle has the manifests that clients of the `platforms` take;
        without platforms, all that are complete in the store. Blobs in `exclude` are left out,
        because an earlier bundle has them. `with_facts` adds what is known about the images. Raises `InvalidReferenceError`, `DeniedError`, and
        `UnknownManifestError` if an image or platform is not in the store.
        """
        requested = [parse_platform(text) for text in platforms]
        with self._image_store.space.lease() as lease:
            # Without duplicates and sorted, so that the request's order does not change the bytes.
            selected: dict[str, _BundleImage] = {}
            report: list[ExportedImage] = []
            for text in images:
                loaded = await self._load_image(text, requested, lease)
                image, exported = _select_platforms(loaded, requested)
                image = await self._add_referrers(image)
                lease.digests.update(_order_blobs([image]))
                selected[image.full_name] = image
                report.append(replace(exported, policy=await self._describe_policy(image)))
            ordered = [selected[name] for name in sorted(selected)]
            facts = await self._collect_facts(ordered) if with_facts else b""
            yield Bundle(ordered, exclude, facts), report

    async def _describe_policy(self, image: _BundleImage) -> PolicySummary | None:
        return await self._image_store.query(
            lambda queries: describe_policy(
                queries,
                self._rules,
                image.repository,
                image.reference,
                image.node.digest,
                self._clock(),
            )
        )

    async def _collect_facts(self, images: Sequence[_BundleImage]) -> bytes:
        """Return the document with what is known about the images."""
        made_at = float(int(self._clock()))
        return await self._image_store.query(
            lambda queries: encode_facts(BundleFacts(made_at, _find_facts(queries, images)))
        )

    async def _load_image(
        self, text: str, platforms: Sequence[Platform], lease: Lease
    ) -> _BundleImage:
        repository, reference = self._image_store.names.parse_allowed(text)
        node = await self._load_tree(repository, reference)
        if self._fetch:
            node = await self._complete(self._fetch, repository, reference, node, platforms, lease)
        if node is None or node.manifest is None:
            problem = node.problem if node else ""
            raise _not_exportable_error(
                repository, reference, problem or "it is not stored; pull or preload it first"
            )
        return _BundleImage(repository, reference, node)

    async def _load_tree(self, repository: Repository, reference: Reference) -> ManifestNode | None:
        return await self._image_store.query(
            lambda queries: load_image(self._image_store, queries, repository, reference)
        )

    async def _complete(
        self,
        fetch: FetchContent,
        repository: Repository,
        reference: Reference,
        node: ManifestNode | None,
        platforms: Sequence[Platform],
        lease: Lease,
    ) -> ManifestNode | None:
        """Return the tree of an image after its missing parts were fetched, as far as possible."""
        if node is None:
            if not await fetch(repository, reference, is_manifest=True):
                return None
            node = await self._load_tree(repository, reference)
        slots = asyncio.Semaphore(MAX_FETCHES)

        async def fetch_part(digest: Digest, *, is_manifest: bool) -> bool:
            async with slots:
                return await fetch(repository, digest, is_manifest=is_manifest)

        tried: set[Digest] = set()
        while node and node.manifest:
            # What was fetched is not evicted while the rest arrives.
            lease.digests.update(digest for one in node.walk() for digest in one.stored)
            missing = _find_missing(_BundleImage(repository, reference, node), platforms)
            parts = {digest: kind for digest, kind in missing.items() if digest not in tried}
            tried.update(parts)
            lease.digests.update(parts)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(fetch_part(digest, is_manifest=is_manifest))
                    for digest, is_manifest in parts.items()
                ]
            if not any(task.result() for task in tasks):
                break
            node = await self._load_tree(repository, reference)
        return node

    async def _add_referrers(self, image: _BundleImage) -> _BundleImage:
        """Return the image with all that refers to it in its repository."""
        found = await self._image_store.query(
            lambda queries: find_referrers(self._image_store, queries, image.repository, image.node)
        )
        referrers = [
            _BundleImage(image.repository, reference, tree)
            for reference, tree in found.trees.items()
        ]
        return replace(image, referrers=tuple(referrers), records=found.records)

    async def stream(self, bundle: Bundle) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the bundle.

        Raises `StorageError` if a blob is damaged; then the caller must not end the bundle.
        """
        async with (
            self._open_chunks(bundle) as blocking_chunks,
            aclosing(read_ahead(blocking_chunks, self._image_store.executor)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def write(
        self, bundle: Bundle, file: LocalFile, on_progress: Callable[[int], None] = lambda _: None
    ) -> int:
        """Write the bundle into an empty file and return its size.

        `on_progress` is called with the number of bytes written so far. Raises
        `FileUnreachableError` and `StorageError`.
        """
        async with self._open_chunks(bundle) as chunks:
            return await local_file.write_file(
                file, chunks, self._image_store.executor, on_progress
            )

    @asynccontextmanager
    async def _open_chunks(self, bundle: Bundle) -> AsyncIterator[Generator[bytes, None, None]]:
        """Yield the bundle's chunks, to be read in a thread, then count a use of each blob.

        Removes a blob that turns out to be damaged, and raises `StorageError`.
        """
        try:
            with closing(self._iterate_chunks(bundle)) as chunks:
                yield chunks
        except _DamagedBlobError as error:
            await self._image_store.space.remove_corrupt(error.digest)
            raise StorageError(str(error)) from error
        for digest in bundle.blobs:
            self._image_store.index.touch(digest)

    def _iterate_chunks(self, bundle: Bundle) -> Generator[bytes, None, None]:
        # Headers and padding go out with the chunk after them.
        pending = bundle.metadata_entries
        for digest, size in bundle.blobs.items():
            pending += tar.encode_header(layout.blob_path(digest), size)
            for chunk in self._read_blob(digest, size):
                yield pending + chunk if pending else chunk
                pending = b""
            pending += bytes(tar.padding_size(size))
        yield pending + tar.END_OF_ARCHIVE

    def _read_blob(self, digest: Digest, size: int) -> Iterator[bytes]:
        """Yield the chunks of a blob; raise `_DamagedBlobError` if its digest does not match."""
        opened = self._image_store.blob_store.open(digest, size)
        if opened is None:
            reason = "is missing or has the wrong size on disk; pull it again"
            raise _DamagedBlobError(reason, digest)
        hasher, offset = digest.new_hasher(), 0
        with opened:
            try:
                while chunk := os.pread(opened.fd, READ_SIZE, offset):
                    hasher.update(chunk)
                    offset += len(chunk)
                    yield chunk
            except OSError as error:
                raise StorageError(f"{digest} cannot be read: {error.strerror}") from error
        if not digest.matches(hasher):
            reason = "was damaged on disk and has been removed; pull it again"
            raise _DamagedBlobError(reason, digest)


class _DamagedBlobError(Exception):
    """The file of a blob does not match the index."""

    def __init__(self, reason: str, digest: Digest) -> None:
        super().__init__(f"{digest} {reason}")
        self.digest = digest


def _find_facts(queries: ImageQueries, images: Iterable[_BundleImage]) -> list[BundledRepository]:
    """Return what is known about the repositories, and since when their images are known."""
    by_repository: dict[Repository, list[ImageAge]] = {}
    for image in images:
        ages = by_repository.setdefault(image.repository, [])
        digest, tag = image.node.digest, image.reference
        meaning = queries.meaning(image.repository, digest)
        if meaning and (meaning.source != IMPORTED or meaning.is_ripe):
            ages.append(
                ImageAge(
                    digest,
                    tag if isinstance(tag, Tag) else None,
                    meaning.first_seen,
                    meaning.pushed_at,
                    meaning.is_ripe,
                )
            )
    return [
        BundledRepository(policy_name(repository), queries.facts(repository), ages)
        for repository, ages in by_repository.items()
    ]


# The choice of manifests.


def _select_platforms(
    image: _BundleImage, platforms: Sequence[Platform]
) -> tuple[_BundleImage, ExportedImage]:
    """Return the image with only the manifests to export, and the report about it.

    Raises `UnknownManifestError` if none is complete, or not all that the platforms take.
    """
    top = image.node
    requested = _find_requested(image, platforms)
    complete = [child for child in requested if child.is_complete]
    exported = _platform_names(complete)
    skipped = _platform_names(child for child in requested if child not in complete)
    if not exported or (platforms and skipped) or top.missing:
        raise _incomplete_error(image, [top, *requested])
    if top.children:
        image = replace(image, node=replace(top, children=complete))
    return image, ExportedImage(image.full_name, str(top.digest), exported, skipped)


def _find_requested(image: _BundleImage, platforms: Sequence[Platform]) -> list[ManifestNode]:
    """Return the manifests right below the top one that the platforms need; without platforms, all.

    Raises `UnknownManifestError` if the image lacks a platform.
    """
    top = image.node
    requested = top.children if top.is_index else [top]
    if platforms:
        chosen = {_choose_manifest(image, platform).digest for platform in platforms}
        attestations = {
            child.digest
            for child in (top.manifest.manifests if top.manifest else ())
            if child.attested in chosen
        }
        requested = [
            child
            for child in requested
            if any(manifest.digest in chosen for manifest in child.platform_manifests())
            or child.digest in attestations
        ]
    return requested


def _find_missing(image: _BundleImage, platforms: Sequence[Platform]) -> dict[Digest, bool]:
    """Return what the store lacks of the manifests to export, and whether each is a manifest."""
    nodes = [node for child in _find_requested(image, platforms) for node in child.walk()]
    return {
        Digest.parse(blob.digest): blob.digest == str(node.digest)
        for node in (image.node, *nodes)
        for blob in node.missing
    }


def _choose_manifest(image: _BundleImage, platform: Platform) -> ManifestNode:
    """Return the manifest that a client of the platform takes, as `OfflineChecker` does.

    Raises `UnknownManifestError`.
    """
    candidates = [(node.platform, node) for node in image.node.platform_manifests()]
    if candidates == [(None, image.node)]:
        return image.node
    manifest = choose_platform(candidates, platform)
    if manifest is None:
        offered = ", ".join(str(candidate or "?") for candidate, _ in candidates)
        reason = f"it has no platform {platform}, only {offered}"[:120]
        raise _not_exportable_error(image.repository, image.reference, reason)
    return manifest


def _platform_names(nodes: Iterable[ManifestNode]) -> list[str]:
    return [
        str(manifest.platform or "?") for node in nodes for manifest in node.platform_manifests()
    ]


def _incomplete_error(image: _BundleImage, nodes: Sequence[ManifestNode]) -> UnknownManifestError:
    reason = "nothing of it is stored; pull or preload it first"
    missing = [*dict.fromkeys(blob for node in nodes for blob in node.all_missing())]
    if problems := [problem for node in nodes for problem in node.all_problems()]:
        reason = problems[0][:120]
    elif missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        reason = f"it lacks {missing[0].digest}{more}; preload it first"
    return _not_exportable_error(image.repository, image.reference, reason)


def _not_exportable_error(
    repository: Repository, reference: Reference, reason: str
) -> UnknownManifestError:
    name = display_name(repository, reference)[:70]
    return UnknownManifestError(f"{name} cannot be exported: {reason}")


# The content of the tar.


def _order_blobs(images: Iterable[_BundleImage]) -> dict[Digest, int]:
    """Return the blobs with their sizes: manifests first, then configs, then layers.

    So the reader of a stream knows which image layers belong to before they arrive.
    """
    everything = [one for image in images for one in (image, *image.referrers)]
    nodes = [node for one in everything for node in one.node.walk()]
    sizes = {digest: size for node in nodes for digest, size in node.stored.items()}
    blobs_of_nodes = [[blob.digest for blob in node.blobs()] for node in nodes]
    configs = [digest for digests in blobs_of_nodes for digest in digests[:1]]
    layers = [digest for digests in blobs_of_nodes for digest in digests[1:]]
    order = [*(node.digest for node in nodes), *configs, *layers]
    return {digest: sizes[digest] for digest in order}


def _documents(images: Sequence[_BundleImage], blobs: Collection[Digest]) -> dict[str, bytes]:
    """Return the layout's documents by name, in their order in the tar."""
    documents = {
        layout.LAYOUT_FILE: layout.LAYOUT_FILE_CONTENT,
        layout.INDEX_FILE: layout.encode_index([_to_index_entry(image) for image in images]),
    }
    if details := layout.encode_details(_bundle_details(images)):
        documents[layout.EXPECTED_FILE] = details
    if docker_images := _docker_images(images, blobs):
        documents[layout.DOCKER_MANIFEST_FILE] = layout.encode_docker_manifest(docker_images)
    return documents


def _bundle_details(images: Sequence[_BundleImage]) -> BundleDetails:
    names = {image.full_name for image in images}
    # By name, because images may share them.
    referrers = {
        one.full_name: one
        for image in images
        for one in image.referrers
        if one.full_name not in names
    }
    records: dict[str, dict[Digest, ReferrerRecord]] = {}
    for image in images:
        name = f"{image.repository.upstream}/{image.repository.name}"
        records.setdefault(name, {}).update(image.records)
    return BundleDetails(
        {
            one.node.digest: [child.digest for child in one.node.children]
            for one in (*images, *(referrers[name] for name in sorted(referrers)))
            if one.node.children
        },
        [_to_index_entry(referrers[name]) for name in sorted(referrers)],
        {
            name: {subject: records[name][subject] for subject in sorted(records[name], key=str)}
            for name in sorted(records)
            if records[name]
        },
    )


def _to_index_entry(image: _BundleImage) -> LayoutImage:
    node = image.node
    assert node.manifest
    return LayoutImage(
        node.digest,
        node.size,
        node.manifest.media_type,
        image.full_name,
        "" if isinstance(image.reference, Digest) else str(image.reference),
    )


def _docker_images(images: Iterable[_BundleImage], blobs: Collection[Digest]) -> list[DockerImage]:
    """Return images for docker's classic image store, which loads one platform per name."""
    docker_images: dict[Digest, DockerImage] = {}
    for image in images:
        nodes = [
            node
            for node in image.node.platform_manifests()
            if node.manifest and _is_docker_loadable(node.manifest, blobs)
        ]
        preferred = [node for node in nodes if str(node.platform) == "linux/amd64"]
        for node in (preferred or nodes)[:1]:
            config, *layers = [blob.digest for blob in node.blobs()]
            names = () if isinstance(image.reference, Digest) else (image.full_name,)
            if config in docker_images:
                names = (*docker_images[config].names, *names)
            docker_images[config] = DockerImage(config, tuple(layers), names)
    return list(docker_images.values())


def _is_docker_loadable(manifest: Manifest, blobs: Collection[Digest]) -> bool:
    return (
        manifest.config is not None
        and manifest.config.media_type in layout.IMAGE_CONFIG_TYPES
        and all(blob.digest in blobs for blob in manifest.blobs)
    )


def _encode_entry(name: str, content: bytes) -> bytes:
    return tar.encode_header(name, len(content)) + content + bytes(tar.padding_size(len(content)))
