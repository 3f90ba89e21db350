"""The store with what is known of it, as images: what they consist of, and how much of that is here."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec

from proxy.concurrency import in_thread
from proxy.errors import InvalidManifestError, StorageError
from proxy.names import Names
from proxy.oci import manifest as oci
from proxy.oci.config import ImageConfig, parse_config
from proxy.oci.digest import Digest
from proxy.oci.manifest import Child, Manifest, Platform
from proxy.oci.platform import is_image
from proxy.oci.reference import Reference, Repository
from proxy.storage.blobs import LocalStore
from proxy.storage.image_queries import Blob, Catalogue, open_catalogue
from proxy.storage.index import Index
from proxy.storage.space import Space

State = Literal["complete", "partial", "absent"]

# An index of indexes is legal; more than this is an attack (image-spec has no bound).
MAX_DEPTH = 4
MAX_MANIFESTS = 2000

R = TypeVar("R")


class Missing(msgspec.Struct, frozen=True):
    """What the store lacks."""

    digest: str
    size: int


class PlatformState(msgspec.Struct, frozen=True):
    """What the store has of one platform: `size` bytes. `platform` is "" where nothing says it."""

    platform: str
    digest: str
    state: State
    size: int
    missing: list[Missing]


@dataclass(slots=True, eq=False)
class Node:
    """A manifest, and what it names as far as it is here.

    `manifest` is None if it is not here, or is none; `children` are an index's manifests. `here` are this one, its
    config and its layers, with their sizes; `missing` is what the store lacks of these, but for foreign layers,
    which no registry has. `problem` says what is wrong beyond that.
    """

    digest: Digest
    size: int
    platform: Platform | None = None
    manifest: Manifest | None = None
    children: list["Node"] = field(default_factory=list)
    here: dict[Digest, int] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    problem: str = ""

    def walk(self) -> Iterator["Node"]:
        """Yield this and everything below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def lacking(self) -> list[Missing]:
        """Return what the store lacks of this and of everything below, each once."""
        return list(dict.fromkeys(gone for node in self.walk() for gone in node.missing))

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with this and everything below."""
        return (node.problem for node in self.walk() if node.problem)

    def images(self) -> list["Node"]:
        """Return what clients run, a manifest for each platform: of a plain image itself."""
        return [
            node
            for node in self.walk()
            if not (node.manifest and node.manifest.is_index) and is_image(node.platform)
        ]

    def blobs(self) -> Iterator[Child]:
        """Yield config and layers that a registry holds, of an index none."""
        if self.manifest and not self.manifest.is_index:
            yield from (child for child in self.manifest.children if not child.is_foreign)

    def state(self) -> PlatformState:
        """Return what is here of this manifest's own."""
        state: State = "partial" if self.missing else "complete"
        return PlatformState(
            str(self.platform or ""),
            str(self.digest),
            state if self.manifest else "absent",
            sum(self.here.values()),
            self.missing,
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """What everything that works with images needs."""

    store: LocalStore
    index: Index
    space: Space
    names: Names
    threads: Executor

    async def read(self, work: Callable[[Catalogue], R]) -> R:
        """Return what `work` finds in the catalogue, in a thread. Raises `StorageError`."""

        def look_up() -> R:
            with open_catalogue(self.index.path) as catalogue:
                return work(catalogue)

        return await in_thread(self.threads, look_up)

    # In a thread.

    def find(
        self, catalogue: Catalogue, repository: Repository, reference: Reference
    ) -> Blob | None:
        """Return the manifest that the reference stands for, if the repository has it here."""
        digest = (
            reference if isinstance(reference, Digest) else catalogue.tag(repository, reference)
        )
        return catalogue.blob(repository, digest) if digest else None

    def closure(
        self,
        catalogue: Catalogue,
        top: Blob,
        repository: Repository | None = None,
        *,
        thoroughly: bool = True,
    ) -> Node:
        """Return the image below a manifest, as much of it as is here: for a repository what that is linked to.

        `thoroughly` asks the disk for every file; else the index is believed.
        """
        child = Child(top.digest, top.size, top.media_type or "", None, is_foreign=False)
        return _Look(self, catalogue, repository, thoroughly).at(child, None, MAX_DEPTH)

    def has(self, digest: Digest, size: int) -> bool:
        """Ask the disk whether there is a file of that size that can be read."""
        with suppress(StorageError):
            if opened := self.store.open(digest, size):
                opened.close()
                return True
        return False

    def manifest(self, digest: Digest, size: int, media_type: str) -> Manifest:
        """Return a manifest of the store. Raises `InvalidManifestError` if it is gone, damaged or none."""
        content = self.store.load(digest, size) if size <= oci.MAX_MANIFEST_SIZE else None
        if content is None:
            raise InvalidManifestError(f"{digest} is gone, damaged, or too large for a manifest")
        return oci.parse(content, media_type)

    def config(self, manifest: Manifest) -> ImageConfig | None:
        """Return the configuration that a manifest names; None if it is not here, or no image's."""
        named = next(iter(manifest.children), None)
        if named is None or named.size > oci.MAX_MANIFEST_SIZE:
            return None
        content = self.store.load(named.digest, named.size)
        try:
            return parse_config(content) if content else None
        except InvalidManifestError:
            return None


class _Look:
    """One look at one image. `at` is where it begins, and goes on."""

    def __init__(
        self,
        contents: Contents,
        catalogue: Catalogue,
        repository: Repository | None,
        thoroughly: bool,
    ) -> None:
        self._contents = contents
        self._catalogue = catalogue
        self._repository = repository
        self._thoroughly = thoroughly
        self._left = MAX_MANIFESTS

    def at(self, named: Child, platform: Platform | None, depth: int) -> Node:
        node = Node(named.digest, named.size, platform)
        self._left -= 1
        self._look_for(node, [named])
        if self._left < 0 or not depth:
            node.problem = "an index names too many manifests, or is nested too deep"
        elif node.here:
            self._open(node, named.media_type, depth)
        if node.manifest is None and not node.missing:
            node.missing.append(Missing(str(node.digest), node.size))
        return node

    def _open(self, node: Node, media_type: str, depth: int) -> None:
        try:
            manifest = self._contents.manifest(node.digest, node.size, media_type)
        except InvalidManifestError as error:
            node.problem = str(error)
            return
        node.manifest = manifest
        if manifest.is_index:
            node.children = [
                self.at(child, child.platform or node.platform, depth - 1)
                for child in manifest.children
            ]
            return
        self._look_for(node, manifest.children)
        if node.platform is None:
            config = self._contents.config(manifest)
            node.platform = config.platform if config else None

    def _look_for(self, node: Node, blobs: Iterable[Child]) -> None:
        named = {blob.digest: blob for blob in blobs}
        known = self._catalogue.present(named, self._repository)
        for digest, blob in named.items():
            size = known.get(digest)
            if size not in (None, blob.size):
                node.problem = f"{digest} has {size} bytes, and not {blob.size} as is stated"
            elif size is not None and (not self._thoroughly or self._contents.has(digest, size)):
                node.here[digest] = size
                continue
            if not blob.is_foreign:
                node.missing.append(Missing(str(digest), blob.size))
