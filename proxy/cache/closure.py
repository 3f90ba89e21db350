"""What an image consists of, and how much of it the store has."""

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from proxy.cache.eviction import Space
from proxy.cache.naming import Names
from proxy.errors import InvalidManifestError
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.storage.index import Index
from proxy.storage.local import LocalStore

# An index of indexes is legal; more than this is an attack (image-spec has no bound).
MAX_DEPTH = 4
MAX_MANIFESTS = 2000


@dataclass(slots=True)
class Node:
    """A manifest with what it names. `manifest` is None if it is not in the store.

    `children` are an index's manifests; `missing` is what the store lacks of this one manifest: itself,
    its config or its layers.
    """

    digest: Digest
    size: int
    manifest: oci.Manifest | None = None
    platform: oci.Platform | None = None
    children: list["Node"] = field(default_factory=list)
    missing: list[Digest] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        """Yield this and everything below, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def lacking(self) -> list[Digest]:
        """Return what the store lacks of this and of everything below, each once."""
        return list(dict.fromkeys(gone for node in self.walk() for gone in node.missing))

    def blobs(self) -> Iterator[oci.Child]:
        """Yield config and layers that a registry holds, of an index none."""
        if self.manifest and not self.manifest.is_index:
            yield from (child for child in self.manifest.children if not child.is_foreign)


@dataclass(frozen=True, slots=True)
class Contents:
    """The store with what is known of it: what bundles are made of, and go into."""

    store: LocalStore
    index: Index
    space: Space
    names: Names
    threads: Executor

    def has(self, digest: Digest, size: int) -> bool:
        """Tell whether the store has a blob of `size` bytes.

        Raises `InvalidManifestError` if it has one of another size: whoever stated it is wrong.
        """
        known = self.index.size(digest)
        if known is None:
            return False
        if known != size:
            raise InvalidManifestError(f"{digest} has {known} bytes, and not {size} as is stated")
        opened = self.store.open(digest, size)
        if opened is None:
            return False
        with opened:
            return True

    async def closure(self, digest: Digest, size: int, media_type: str) -> Node:
        """Return the image below a manifest. Raises `InvalidManifestError`."""
        return await self._look(Node(digest, size), media_type, [MAX_MANIFESTS], MAX_DEPTH)

    async def _look(self, node: Node, media_type: str, budget: list[int], depth: int) -> Node:
        budget[0] -= 1
        if budget[0] < 0 or not depth:
            raise InvalidManifestError("an index names too many manifests, or is nested too deep")
        content = None
        if self.has(node.digest, node.size) and node.size <= oci.MAX_MANIFEST_SIZE:
            content = await self.store.read(node.digest)
        if content is None:
            node.missing.append(node.digest)
            return node
        node.manifest = manifest = oci.parse(content, media_type)
        if manifest.is_index:
            for child in manifest.children:
                below = Node(child.digest, child.size, platform=child.platform)
                node.children.append(await self._look(below, child.media_type, budget, depth - 1))
        else:
            node.missing += [
                blob.digest for blob in node.blobs() if not self.has(blob.digest, blob.size)
            ]
        return node
