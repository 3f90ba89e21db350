"""Image trees: a manifest, the manifests below it, and which of their blobs the store has."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from proxy.errors import InvalidManifestError
from proxy.images.store import ImageStore
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.platform import Platform, is_runnable
from proxy.oci.reference import Reference, Repository
from proxy.storage.image_queries import ImageQueries, StoredBlob
from proxy.storage.index_writes import MAX_CHILDREN

ImageState = Literal["complete", "partial", "absent"]

# An index may contain indexes, and the image-spec sets no limit. More than this is an attack.
MAX_INDEX_DEPTH = 4
MAX_MANIFESTS = 2000
MAX_BLOBS = 20_000


class MissingBlob(msgspec.Struct, frozen=True):
    """A blob that the store lacks; `size` is 0 if no manifest states it."""

    digest: str
    size: int


class PlatformState(msgspec.Struct, frozen=True):
    """The stored part of an image for one platform: `size` bytes.

    The platform is "" if the image does not state it.
    """

    platform: str
    digest: str
    state: ImageState
    size: int
    missing: list[MissingBlob]


@dataclass(slots=True, eq=False)
class ManifestNode:
    """A manifest, and the manifests below it if it is an index.

    `manifest` is None if it is not stored or cannot be parsed. `stored` maps the manifest itself,
    its config and its layers to their sizes; `missing` are those that the store lacks, except
    foreign layers, which no registry serves. `problem` describes any other fault.
    """

    digest: Digest
    size: int
    platform: Platform | None = None
    manifest: Manifest | None = None
    children: list["ManifestNode"] = field(default_factory=list)
    stored: dict[Digest, int] = field(default_factory=dict)
    missing: list[MissingBlob] = field(default_factory=list)
    problem: str = ""

    @property
    def is_index(self) -> bool:
        """Whether this is a stored image index."""
        return self.manifest is not None and self.manifest.is_index

    def walk(self) -> Iterator["ManifestNode"]:
        """Yield this node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def platform_manifests(self) -> list["ManifestNode"]:
        """Return the manifests that a client can run, one for each platform."""
        return [node for node in self.walk() if not node.is_index and is_runnable(node.platform)]

    def blobs(self) -> Iterator[Descriptor]:
        """Yield the blobs that the manifest names, except foreign layers."""
        if self.manifest:
            yield from (blob for blob in self.manifest.blobs if not blob.is_foreign)

    @property
    def is_complete(self) -> bool:
        """Whether this node and all below it are stored and could be read."""
        return not (self.all_missing() or self.all_problems())

    def all_missing(self) -> list[MissingBlob]:
        """Return the missing blobs of this node and all below it, without duplicates."""
        return list(dict.fromkeys(blob for node in self.walk() for blob in node.missing))

    def all_problems(self) -> list[str]:
        """Return the problems of this node and all below it."""
        return [node.problem for node in self.walk() if node.problem]

    def platform_state(self) -> PlatformState:
        """Return the state of this manifest and its blobs, without the manifests below it."""
        state: ImageState = "partial" if self.missing or self.problem else "complete"
        return PlatformState(
            str(self.platform or ""),
            str(self.digest),
            state if self.manifest else "absent",
            sum(self.stored.values()),
            self.missing,
        )


# The functions below block on the disk.


def load_image(
    image_store: ImageStore, queries: ImageQueries, repository: Repository, reference: Reference
) -> ManifestNode | None:
    """Return the tree of a repository's image; None if its top manifest is not stored there."""
    digest = (
        reference if isinstance(reference, Digest) else queries.tag_digest(repository, reference)
    )
    top = queries.blob(repository, digest) if digest else None
    return build_tree(image_store, queries, top, repository) if top else None


def build_tree(
    image_store: ImageStore,
    queries: ImageQueries,
    top: StoredBlob,
    repository: Repository | None = None,
    *,
    check_files: bool = True,
) -> ManifestNode:
    """Return the tree below a manifest, as far as it is stored.

    With a repository, only blobs linked to it count as stored. `check_files` looks for the file of
    each blob on the disk; without, the index is trusted.
    """
    builder = _TreeBuilder(image_store, queries, repository, check_files=check_files)
    descriptor = Descriptor(top.digest, top.size, top.media_type or "", None, is_foreign=False)
    return builder.build(descriptor, None, MAX_INDEX_DEPTH)


class _TreeBuilder:
    """Builds one tree. `MAX_MANIFESTS` and `MAX_BLOBS` bound the whole tree, not one index."""

    def __init__(
        self,
        image_store: ImageStore,
        queries: ImageQueries,
        repository: Repository | None,
        *,
        check_files: bool,
    ) -> None:
        self._image_store = image_store
        self._queries = queries
        self._repository = repository
        self._check_files = check_files
        self._remaining_manifests = MAX_MANIFESTS
        self._remaining_blobs = MAX_BLOBS

    def build(self, descriptor: Descriptor, platform: Platform | None, depth: int) -> ManifestNode:
        node = ManifestNode(descriptor.digest, descriptor.size or 0, platform)
        self._remaining_manifests -= 1
        self._record_blobs(node, [descriptor])
        if self._remaining_manifests < 0 or not depth:
            node.problem = "the image index names too many manifests or is nested too deeply"
        elif node.stored:
            node.size = node.stored[node.digest]
            self._fill_from_manifest(node, depth)
        if node.manifest is None and not node.missing:
            node.missing.append(MissingBlob(str(node.digest), node.size))
        return node

    def _fill_from_manifest(self, node: ManifestNode, depth: int) -> None:
        try:
            manifest = self._image_store.load_manifest(node.digest, node.size)
        except InvalidManifestError as error:
            node.problem = str(error)
            return
        if (count := manifest.child_count) > MAX_CHILDREN:
            node.problem = f"the manifest names {count} blobs, more than {MAX_CHILDREN}"
            return
        self._remaining_blobs -= count
        if self._remaining_blobs < 0:
            node.problem = f"the image names more than {MAX_BLOBS} blobs"
            return
        node.manifest = manifest
        if manifest.unread:
            node.problem = f"the manifest cannot be read: {manifest.unread}"
        node.children = [
            self.build(child, child.platform or node.platform, depth - 1)
            for child in manifest.manifests
        ]
        self._record_blobs(node, manifest.blobs)
        if node.platform is None and not manifest.is_index:
            config = self._image_store.load_config(manifest, node.stored)
            node.platform = config.platform if config else None

    def _record_blobs(self, node: ManifestNode, descriptors: Iterable[Descriptor]) -> None:
        """Note for each blob whether it is stored, missing, or of a size other than stated."""
        blobs = {blob.digest: blob for blob in descriptors}
        stored_sizes = self._queries.stored_sizes(blobs, self._repository)
        for digest, blob in blobs.items():
            size = stored_sizes.get(digest)
            if size is not None and blob.size not in (None, size):
                node.problem = (
                    f"{digest} has {size} bytes, not {blob.size} as its descriptor states"
                )
            elif size is not None and (
                not self._check_files or self._image_store.has_blob(digest, size)
            ):
                node.stored[digest] = size
                continue
            if not blob.is_foreign:
                node.missing.append(MissingBlob(str(digest), blob.size or 0))
