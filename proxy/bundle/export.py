"""Images as one tar that is an OCI image layout, and that every `docker load` takes too.

The bytes of the store go out as they are, each blob hashed on its way: what is damaged on the disk is
not handed on. The same images make the same bundle, and its size is known before its first byte.
"""

import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass

from proxy.bundle import local_file
from proxy.bundle.local_file import File
from proxy.concurrency import read_ahead
from proxy.errors import StorageError, UnknownManifestError
from proxy.images.tree import Contents, Missing, Node
from proxy.names import spell
from proxy.oci import layout, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import DockerImage, Listed
from proxy.oci.manifest import Platform
from proxy.oci.platform import choose, parse_platform
from proxy.oci.reference import Reference, Repository
from proxy.storage.image_queries import Catalogue

# What is read, hashed and written in one thread stays in its cache.
READ = 256 << 10


@dataclass(frozen=True, slots=True)
class Exported:
    """An image of a bundle. `left_out` are platforms that its index names and the store has not."""

    name: str
    digest: str
    platforms: list[str]
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _Image:
    repository: Repository
    reference: Reference
    node: Node

    @property
    def name(self) -> str:
        """The name in full, as containerd writes it."""
        mark = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.repository.upstream}/{self.repository.name}{mark}{self.reference}"

    def nodes(self) -> list[Node]:
        """Return the manifests that can be run: what the bundle holds of an index, or the one there is."""
        return [node for node in self.node.images() if node.manifest]


class Bundle:
    """What is to be sent: `size` bytes, the same whenever the same images are asked for."""

    def __init__(self, images: Sequence[_Image], without: Collection[Digest]) -> None:
        self.blobs = {
            digest: size for digest, size in _in_order(images).items() if digest not in without
        }
        documents = {
            layout.LAYOUT: layout.LAYOUT_DOCUMENT,
            layout.INDEX: layout.write_index([_listed(image) for image in images]),
        }
        if meant := {
            image.node.digest: [child.digest for child in image.node.children]
            for image in images
            if image.node.children
        }:
            documents[layout.MEANT] = layout.write_meant(meant)
        if loadable := _for_docker(images, self.blobs):
            documents[layout.DOCKER] = layout.write_docker(loadable)
        self.head = b"".join(_framed(name, content) for name, content in documents.items())
        self.size = len(self.head) + len(tar.END)
        for digest, size in self.blobs.items():
            header = tar.write_header(layout.blob_path(digest), size)
            self.size += len(header) + size + tar.padding(size)


class Exporter:
    """Makes bundles of what the store has."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    @asynccontextmanager
    async def open(
        self,
        images: Iterable[str],
        *,
        platforms: Sequence[str] = (),
        without: Collection[Digest] = (),
    ) -> AsyncIterator[tuple[Bundle, list[Exported]]]:
        """Find the images and keep them in the store for as long as the context lasts.

        Of an image index goes out what clients of the `platforms` take, by default all that is whole here.
        Blobs `without` are left out: an earlier bundle has them. Raises `InvalidReferenceError`,
        `DeniedError`, and `UnknownManifestError` if something is not here.
        """
        with self._contents.space.hold() as hold:
            found = []
            report = []
            wanted = [*map(parse_platform, platforms)]
            for text in images:
                image = await self._find(text)
                report.append(_cut(image, wanted))
                found.append(image)
                hold.digests.update(_in_order([image]))
            # Each once, and in an order of its own: it does not matter how they were asked for.
            unique = {image.name: image for image in found}
            yield Bundle([unique[name] for name in sorted(unique)], without), report

    async def _find(self, text: str) -> _Image:
        repository, reference = self._contents.names.parse(text)

        def look(catalogue: Catalogue) -> Node | None:
            top = self._contents.find(catalogue, repository, reference)
            return self._contents.closure(catalogue, top, repository) if top else None

        node = await self._contents.read(look)
        if node is None or node.manifest is None:
            reason = node.problem if node else ""
            raise _unknown(
                repository, reference, reason or "it is not stored; pull or preload it first"
            )
        return _Image(repository, reference, node)

    async def chunks(self, bundle: Bundle) -> AsyncGenerator[bytes, None]:
        """Yield the bundle. Raises `StorageError` if a blob is damaged: the rest must not be sent."""
        async with (
            self._counted(bundle) as pieces,
            aclosing(read_ahead(pieces, self._contents.threads)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def write(
        self, bundle: Bundle, file: File, progress: Callable[[int], None] = lambda _: None
    ) -> int:
        """Write the bundle into an empty file, and return its size; `progress` is told how far it is.

        Raises `FileUnreachableError` and `StorageError`.
        """
        async with self._counted(bundle) as pieces:
            return await local_file.write(file, pieces, self._contents.threads, progress)

    @asynccontextmanager
    async def _counted(self, bundle: Bundle) -> AsyncIterator[Generator[bytes, None, None]]:
        """Yield the bundle's pieces, for a thread. When they were taken, count the uses."""
        try:
            with closing(self._pieces(bundle)) as pieces:
                yield pieces
        except _DamagedError as error:
            await self._contents.space.forget(error.digest, error.size)
            raise StorageError(f"{error.digest} {error} on the disk; pull it again") from error
        for digest in bundle.blobs:
            self._contents.index.touch(digest)

    def _pieces(self, bundle: Bundle) -> Generator[bytes, None, None]:
        edge = bundle.head
        for digest, size in bundle.blobs.items():
            edge += tar.write_header(layout.blob_path(digest), size)
            for piece in self._blob(digest, size):
                yield edge + piece if edge else piece
                edge = b""
            edge += bytes(tar.padding(size))
        yield edge + tar.END

    def _blob(self, digest: Digest, size: int) -> Iterator[bytes]:
        """Yield a blob, hashed: what is damaged has gone out by then, and makes no whole bundle."""
        opened = self._contents.store.open(digest, size)
        if opened is None:
            raise _DamagedError("is gone, or of another size", digest, size)
        hasher, offset = digest.hasher(), 0
        with opened:
            try:
                while piece := os.pread(opened.fd, READ, offset):
                    hasher.update(piece)
                    offset += len(piece)
                    yield piece
            except OSError as error:
                raise StorageError(f"the disk cannot be read: {error.strerror}") from error
        if not digest.matches(hasher):
            raise _DamagedError("is damaged, and was removed,", digest, size)


class _DamagedError(Exception):
    """A blob is not what the index says."""

    def __init__(self, what: str, digest: Digest, size: int) -> None:
        super().__init__(what)
        self.digest = digest
        self.size = size


def _framed(name: str, content: bytes) -> bytes:
    return tar.write_header(name, len(content)) + content + bytes(tar.padding(len(content)))


def _cut(image: _Image, platforms: Sequence[Platform]) -> Exported:
    """Take out of the image what is not to go out, and say so. Raises `UnknownManifestError`."""
    top = image.node
    asked = top.children if top.manifest and top.manifest.is_index else [top]
    if platforms:
        chosen = {_choose(image, platform).digest for platform in platforms}
        asked = [part for part in asked if any(one.digest in chosen for one in part.images())]
    whole = [part for part in asked if not part.lacking()]
    left_out = _platforms(part for part in asked if part not in whole)
    there = _platforms(whole)
    if not there or (platforms and left_out):
        raise _incomplete(image, [gone for part in asked for gone in part.lacking()])
    if top.children:
        top.children = whole
    return Exported(image.name, str(top.digest), there, left_out)


def _choose(image: _Image, platform: Platform) -> Node:
    """Return what clients of the platform take, as `check-offline` has it. Raises `UnknownManifestError`."""
    offered = [(one.platform, one) for one in image.node.images()]
    if offered == [(None, image.node)]:
        return image.node
    found = choose(offered, platform)
    if found is None:
        named = ", ".join(str(one or "?") for one, _ in offered)
        reason = f"it has no {platform}, only {named}"[:120]
        raise _unknown(image.repository, image.reference, reason)
    return found


def _platforms(parts: Iterable[Node]) -> list[str]:
    return [str(one.platform or "?") for part in parts for one in part.images()]


def _incomplete(image: _Image, missing: Sequence[Missing]) -> UnknownManifestError:
    reason = "nothing of it is stored; pull or preload it first"
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        reason = f"it lacks {missing[0].digest}{more}; preload it first"
    return _unknown(image.repository, image.reference, reason)


def _unknown(repository: Repository, reference: Reference, reason: str) -> UnknownManifestError:
    name = spell(repository, reference)[:70]
    return UnknownManifestError(f"{name} cannot be exported: {reason}")


def _in_order(images: Iterable[_Image]) -> dict[Digest, int]:
    """Return the blobs with their sizes: manifests, configs, layers.

    What is said of the rest comes first, so that who reads a stream knows what it is about.
    """
    nodes = [node for image in images for node in image.node.walk()]
    blobs = {node.digest: node.size for node in nodes}
    for first in (True, False):
        for node in nodes:
            for number, blob in enumerate(node.blobs()):
                if first == (number == 0):
                    blobs.setdefault(blob.digest, blob.size)
    return blobs


def _listed(image: _Image) -> Listed:
    node = image.node
    assert node.manifest
    return Listed(
        node.digest,
        node.size,
        node.manifest.media_type,
        image.name,
        "" if isinstance(image.reference, Digest) else str(image.reference),
    )


def _for_docker(images: Iterable[_Image], blobs: Collection[Digest]) -> list[DockerImage]:
    """Return what a docker without containerd's store can load: one platform a name, and whole."""
    found: dict[Digest, DockerImage] = {}
    for image in images:
        nodes = [node for node in image.nodes() if _is_loadable(node, blobs)]
        preferred = [node for node in nodes if str(node.platform) == "linux/amd64"]
        for node in (preferred or nodes)[:1]:
            config, *layers = [blob.digest for blob in node.blobs()]
            names = () if isinstance(image.reference, Digest) else (image.name,)
            if config in found:
                names = (*found[config].names, *names)
            found[config] = DockerImage(config, tuple(layers), names)
    return list(found.values())


def _is_loadable(node: Node, blobs: Collection[Digest]) -> bool:
    assert node.manifest
    children = node.manifest.children
    return children[0].media_type in layout.IMAGE_CONFIGS and all(
        child.digest in blobs for child in children
    )
