"""Images as one tar that is an OCI image layout, and that every `docker load` takes too.

The bytes of the store go out as they are, each blob hashed on its way: what is damaged on the disk is
not handed on. The same images make the same bundle, and its size is known before its first byte.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from proxy.cache.closure import Contents, Node
from proxy.cache.naming import spell
from proxy.errors import InvalidManifestError, StorageError, UnknownManifestError
from proxy.flight import to_the_end
from proxy.oci import layout, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import DockerImage, Listed
from proxy.oci.reference import Reference
from proxy.storage.local import OpenBlob
from proxy.storage.tables import Repository

READ = 1 << 20


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
        """Return the manifests that have blobs: what the bundle holds of an index, or the one there is."""
        return [node for node in self.node.walk() if node.manifest and not node.manifest.is_index]


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

        Of an image index the `platforms` that are named go out, by default all that are whole here.
        Blobs `without` are left out: an earlier bundle has them. Raises `InvalidReferenceError`,
        `DeniedError`, and `UnknownManifestError` if something is not here.
        """
        with self._contents.space.hold() as hold:
            found = []
            report = []
            for text in images:
                image = await self._find(text)
                report.append(_cut(image, platforms))
                found.append(image)
                hold.digests.update(_in_order([image]))
            # Each once, and in an order of its own: it does not matter how they were asked for.
            unique = {image.name: image for image in found}
            yield Bundle([unique[name] for name in sorted(unique)], without), report

    async def _find(self, text: str) -> _Image:
        repository, reference = self._contents.names.parse(text)
        if isinstance(reference, Digest):
            digest = reference
        elif known := self._contents.index.tag(repository, reference):
            digest = known.digest
        else:
            raise _unknown(repository, reference, "its tag is not known")
        row = self._contents.index.blob(repository, digest)
        if row is None or row.media_type is None or not row.is_linked:
            raise _unknown(repository, reference, "its manifest is not stored")
        try:
            node = await self._contents.closure(digest, row.size, row.media_type)
        except InvalidManifestError as error:
            raise _unknown(repository, reference, str(error)) from error
        return _Image(repository, reference, node)

    async def chunks(self, bundle: Bundle) -> AsyncGenerator[bytes, None]:
        """Yield the bundle. Raises `StorageError` if a blob is damaged: the rest must not be sent."""
        yield bundle.head
        for digest, size in bundle.blobs.items():
            yield tar.write_header(layout.blob_path(digest), size)
            async with aclosing(self._blob(digest, size)) as chunks:
                async for chunk in chunks:
                    yield chunk
            if fill := tar.padding(size):
                yield bytes(fill)
            self._contents.index.touch(digest)
        yield tar.END

    async def _blob(self, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        """Yield a blob; the next chunk is read and hashed while one is sent."""
        opened = self._contents.store.open(digest, size)
        if opened is None:
            await self._contents.space.forget(digest, size)
            raise StorageError(f"the file of {digest} is gone or of another size; pull it again")
        loop = asyncio.get_running_loop()
        with opened:
            reader = _Reader(opened, digest)
            reading = loop.run_in_executor(self._contents.threads, reader.read)
            try:
                while chunk := await _result(reading):
                    reading = loop.run_in_executor(self._contents.threads, reader.read)
                    yield chunk
            finally:
                # The file is closed behind its last reader.
                await to_the_end(asyncio.wait((reading,)))
        if not reader.is_right():
            await self._contents.space.forget(digest, size)
            raise StorageError(f"{digest} is damaged on the disk and was removed; pull it again")


class _Reader:
    """Reads a blob from its beginning to its end, and hashes it. `read` blocks."""

    def __init__(self, opened: OpenBlob, digest: Digest) -> None:
        self._fd = opened.fd
        self._digest = digest
        self._hasher = digest.hasher()
        self._offset = 0

    def read(self) -> bytes:
        chunk = os.pread(self._fd, READ, self._offset)
        self._hasher.update(chunk)
        self._offset += len(chunk)
        return chunk

    def is_right(self) -> bool:
        return self._digest.matches(self._hasher)


async def _result(reading: "asyncio.Future[bytes]") -> bytes:
    # Not `await reading`: who is cancelled would cancel it, and nobody could wait for its thread.
    await asyncio.wait((reading,))
    try:
        return reading.result()
    except OSError as error:
        raise StorageError(f"the disk cannot be read: {error.strerror}") from error


def _framed(name: str, content: bytes) -> bytes:
    return tar.write_header(name, len(content)) + content + bytes(tar.padding(len(content)))


def _cut(image: _Image, platforms: Sequence[str]) -> Exported:
    """Take out of the image what is not to go out, and say so. Raises `UnknownManifestError`."""
    node, left_out = image.node, list[str]()
    if node.manifest and node.manifest.is_index:
        asked = [child for child in node.children if _is_asked(child, platforms)]
        whole = [child for child in asked if not child.lacking()]
        named = [str(child.platform or "?") for child in node.children]
        for platform in platforms:
            if not any(_is_asked(child, [platform]) for child in node.children):
                raise _unknown(
                    image.repository,
                    image.reference,
                    f"it has no {platform}, only {', '.join(named)}",
                )
        left_out = [str(child.platform or "?") for child in asked if child.lacking()]
        is_enough = any(not _is_attestation(child) for child in whole)
        if not is_enough or (platforms and left_out):
            raise _incomplete(image, [gone for child in asked for gone in child.lacking()])
        node.children = whole
    elif node.missing:
        raise _incomplete(image, node.missing)
    there = [str(child.platform or "?") for child in node.children]
    return Exported(image.name, str(node.digest), there, left_out)


def _is_asked(node: Node, platforms: Sequence[str]) -> bool:
    """Tell whether a platform is named, or begins with one that is: `linux/arm64` takes every variant."""
    return not platforms or any(
        f"{node.platform}/".startswith(f"{platform}/") for platform in platforms
    )


def _is_attestation(node: Node) -> bool:
    """Tell whether it is what BuildKit says of an image, rather than an image."""
    return node.platform is not None and node.platform.os == "unknown"


def _incomplete(image: _Image, missing: Sequence[Digest]) -> UnknownManifestError:
    reason = (
        f"{len(missing)} of its blobs are not stored, {missing[0]} among them" if missing else ""
    )
    return _unknown(image.repository, image.reference, reason or "nothing of it is stored")


def _unknown(repository: Repository, reference: Reference, reason: str) -> UnknownManifestError:
    return UnknownManifestError(
        f"{spell(repository, reference)} cannot be exported: {reason}; pull or preload it first"
    )


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
    return (
        children[0].media_type in layout.IMAGE_CONFIGS
        and not _is_attestation(node)
        and all(child.digest in blobs for child in children)
    )
