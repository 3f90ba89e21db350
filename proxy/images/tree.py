"""The store with what is known of it, as images: what they consist of, and how much of that is here."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec

from proxy.concurrency import run_in_thread
from proxy.errors import InvalidManifestError, StorageError
from proxy.names import NameParser
from proxy.oci import manifest as oci
from proxy.oci.config import ImageConfig, parse_config
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.platform import Platform, is_runnable
from proxy.oci.reference import Reference, Repository
from proxy.storage.blobs import BlobStore
from proxy.storage.image_queries import ImageQueries, StoredBlob, open_image_queries
from proxy.storage.index import Index
from proxy.storage.space import SpaceManager

ImageState = Literal["complete", "partial", "absent"]

# An index of indexes is legal; more than this is an attack (image-spec has no bound).
MAX_INDEX_DEPTH = 4
MAX_MANIFESTS = 2000

R = TypeVar("R")


class MissingBlob(msgspec.Struct, frozen=True):
    """What the store lacks."""

    digest: str
    size: int


class PlatformState(msgspec.Struct, frozen=True):
    """What the store has of one platform: `size` bytes. `platform` is "" where nothing says it."""

    platform: str
    digest: str
    state: ImageState
    size: int
    missing: list[MissingBlob]


@dataclass(slots=True, eq=False)
class ManifestNode:
    """A manifest, and what it names as far as it is here.

    `manifest` is None if it is not here, or is none; `children` are an index's manifests. `here` are this one, its
    config and its layers, with their sizes; `missing` is what the store lacks of these, but for foreign layers,
    which no registry has. `problem` says what is wrong beyond that.
    """

    digest: Digest
    size: int
    platform: Platform | None = None
    manifest: Manifest | None = None
    children: list["ManifestNode"] = field(default_factory=list)
    stored: dict[Digest, int] = field(default_factory=dict)
    missing: list[MissingBlob] = field(default_factory=list)
    problem: str = ""

    def walk(self) -> Iterator["ManifestNode"]:
        """Yield this and everything below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def all_missing(self) -> list[MissingBlob]:
        """Return what the store lacks of this and of everything below, each once."""
        return list(dict.fromkeys(gone for node in self.walk() for gone in node.missing))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with this and everything below."""
        return (node.problem for node in self.walk() if node.problem)

    def platform_manifests(self) -> list["ManifestNode"]:
        """Return what clients run, a manifest for each platform: of a plain image itself."""
        return [
            node
            for node in self.walk()
            if not (node.manifest and node.manifest.is_index) and is_runnable(node.platform)
        ]

    def blobs(self) -> Iterator[Descriptor]:
        """Yield config and layers that a registry holds, of an index none."""
        if self.manifest and not self.manifest.is_index:
            yield from (child for child in self.manifest.children if not child.is_foreign)

    def platform_state(self) -> PlatformState:
        """Return what is here of this manifest's own."""
        state: ImageState = "partial" if self.missing else "complete"
        return PlatformState(
            str(self.platform or ""),
            str(self.digest),
            state if self.manifest else "absent",
            sum(self.stored.values()),
            self.missing,
        )


@dataclass(frozen=True, slots=True)
class ImageStore:
    """What everything that works with images needs."""

    blob_store: BlobStore
    index: Index
    space: SpaceManager
    names: NameParser
    executor: Executor

    async def query(self, work: Callable[[ImageQueries], R]) -> R:
        """Return what `work` finds in the catalogue, in a thread. Raises `StorageError`."""

        def look_up() -> R:
            with open_image_queries(self.index.path) as catalogue:
                return work(catalogue)

        return await run_in_thread(self.executor, look_up)

    # In a thread.

    def find_manifest(
        self, queries: ImageQueries, repository: Repository, reference: Reference
    ) -> StoredBlob | None:
        """Return the manifest that the reference stands for, if the repository has it here."""
        digest = (
            reference
            if isinstance(reference, Digest)
            else queries.tag_digest(repository, reference)
        )
        return queries.blob(repository, digest) if digest else None

    def build_tree(
        self,
        queries: ImageQueries,
        top: StoredBlob,
        repository: Repository | None = None,
        *,
        check_files: bool = True,
    ) -> ManifestNode:
        """Return the image below a manifest, as much of it as is here: for a repository what that is linked to.

        `thoroughly` asks the disk for every file; else the index is believed.
        """
        child = Descriptor(top.digest, top.size, top.media_type or "", None, is_foreign=False)
        return _TreeBuilder(self, queries, repository, check_files).build(
            child, None, MAX_INDEX_DEPTH
        )

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Ask the disk whether there is a file of that size that can be read."""
        with suppress(StorageError):
            if opened := self.blob_store.open(digest, size):
                opened.close()
                return True
        return False

    def load_manifest(self, digest: Digest, size: int, media_type: str) -> Manifest:
        """Return a manifest of the store. Raises `InvalidManifestError` if it is gone, damaged or none."""
        content = self.blob_store.read_sync(digest, size) if size <= oci.MAX_MANIFEST_SIZE else None
        if content is None:
            raise InvalidManifestError(f"{digest} is gone, damaged, or too large for a manifest")
        return oci.parse_manifest(content, media_type)

    def load_config(self, manifest: Manifest) -> ImageConfig | None:
        """Return the configuration that a manifest names; None if it is not here, or no image's."""
        named = next(iter(manifest.children), None)
        if named is None or named.size > oci.MAX_MANIFEST_SIZE:
            return None
        content = self.blob_store.read_sync(named.digest, named.size)
        try:
            return parse_config(content) if content else None
        except InvalidManifestError:
            return None


class _TreeBuilder:
    """One look at one image. `at` is where it begins, and goes on."""

    def __init__(
        self,
        image_store: ImageStore,
        queries: ImageQueries,
        repository: Repository | None,
        check_files: bool,
    ) -> None:
        self._image_store = image_store
        self._queries = queries
        self._repository = repository
        self._check_files = check_files
        self._remaining_manifests = MAX_MANIFESTS

    def build(self, child: Descriptor, platform: Platform | None, depth: int) -> ManifestNode:
        node = ManifestNode(child.digest, child.size, platform)
        self._remaining_manifests -= 1
        self._check_blobs(node, [child])
        if self._remaining_manifests < 0 or not depth:
            node.problem = "an index names too many manifests, or is nested too deep"
        elif node.stored:
            self._load_manifest(node, child.media_type, depth)
        if node.manifest is None and not node.missing:
            node.missing.append(MissingBlob(str(node.digest), node.size))
        return node

    def _load_manifest(self, node: ManifestNode, media_type: str, depth: int) -> None:
        try:
            manifest = self._image_store.load_manifest(node.digest, node.size, media_type)
        except InvalidManifestError as error:
            node.problem = str(error)
            return
        node.manifest = manifest
        if manifest.is_index:
            node.children = [
                self.build(child, child.platform or node.platform, depth - 1)
                for child in manifest.children
            ]
            return
        self._check_blobs(node, manifest.children)
        if node.platform is None:
            config = self._image_store.load_config(manifest)
            node.platform = config.platform if config else None

    def _check_blobs(self, node: ManifestNode, blobs: Iterable[Descriptor]) -> None:
        named = {blob.digest: blob for blob in blobs}
        known = self._queries.stored_sizes(named, self._repository)
        for digest, blob in named.items():
            size = known.get(digest)
            if size not in (None, blob.size):
                node.problem = f"{digest} has {size} bytes, and not {blob.size} as is stated"
            elif size is not None and (
                not self._check_files or self._image_store.has_blob(digest, size)
            ):
                node.stored[digest] = size
                continue
            if not blob.is_foreign:
                node.missing.append(MissingBlob(str(digest), blob.size))
