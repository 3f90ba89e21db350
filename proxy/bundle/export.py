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
from proxy.bundle.local_file import LocalFile
from proxy.concurrency import read_ahead
from proxy.errors import StorageError, UnknownManifestError
from proxy.images.tree import ImageStore, ManifestNode, MissingBlob
from proxy.names import display_name
from proxy.oci import layout, tar
from proxy.oci.digest import Digest
from proxy.oci.layout import DockerImage, LayoutImage
from proxy.oci.platform import Platform, choose_platform, parse_platform
from proxy.oci.reference import Reference, Repository
from proxy.storage.image_queries import ImageQueries

# What is read, hashed and written in one thread stays in its cache.
READ_SIZE = 256 << 10


@dataclass(frozen=True, slots=True)
class ExportedImage:
    """An image of a bundle. `left_out` are platforms that its index names and the store has not."""

    name: str
    digest: str
    platforms: list[str]
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _BundleImage:
    repository: Repository
    reference: Reference
    node: ManifestNode

    @property
    def name(self) -> str:
        """The name in full, as containerd writes it."""
        mark = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.repository.upstream}/{self.repository.name}{mark}{self.reference}"

    def stored_manifests(self) -> list[ManifestNode]:
        """Return the manifests that can be run: what the bundle holds of an index, or the one there is."""
        return [node for node in self.node.platform_manifests() if node.manifest]


class Bundle:
    """What is to be sent: `size` bytes, the same whenever the same images are asked for."""

    def __init__(self, images: Sequence[_BundleImage], exclude: Collection[Digest]) -> None:
        self.blobs = {
            digest: size for digest, size in _order_blobs(images).items() if digest not in exclude
        }
        documents = {
            layout.LAYOUT_FILE: layout.LAYOUT_FILE_CONTENT,
            layout.INDEX_FILE: layout.encode_index([_to_index_entry(image) for image in images]),
        }
        if meant := {
            image.node.digest: [child.digest for child in image.node.children]
            for image in images
            if image.node.children
        }:
            documents[layout.EXPECTED_FILE] = layout.encode_expected(meant)
        if loadable := _list_docker_images(images, self.blobs):
            documents[layout.DOCKER_MANIFEST_FILE] = layout.encode_docker_manifest(loadable)
        self.metadata_entries = b"".join(
            _write_tar_entry(name, content) for name, content in documents.items()
        )
        self.size = len(self.metadata_entries) + len(tar.END_OF_ARCHIVE)
        for digest, size in self.blobs.items():
            header = tar.encode_header(layout.blob_path(digest), size)
            self.size += len(header) + size + tar.padding_size(size)


class BundleExporter:
    """Makes bundles of what the store has."""

    def __init__(self, image_store: ImageStore) -> None:
        self._image_store = image_store

    @asynccontextmanager
    async def open_bundle(
        self,
        images: Iterable[str],
        *,
        platforms: Sequence[str] = (),
        exclude: Collection[Digest] = (),
    ) -> AsyncIterator[tuple[Bundle, list[ExportedImage]]]:
        """Find the images and keep them in the store for as long as the context lasts.

        Of an image index goes out what clients of the `platforms` take, by default all that is whole here.
        Blobs `without` are left out: an earlier bundle has them. Raises `InvalidReferenceError`,
        `DeniedError`, and `UnknownManifestError` if something is not here.
        """
        with self._image_store.space.lease() as hold:
            found = []
            report = []
            wanted = [*map(parse_platform, platforms)]
            for text in images:
                image = await self._find_image(text)
                report.append(_drop_unselected(image, wanted))
                found.append(image)
                hold.digests.update(_order_blobs([image]))
            # Each once, and in an order of its own: it does not matter how they were asked for.
            unique = {image.name: image for image in found}
            yield Bundle([unique[name] for name in sorted(unique)], exclude), report

    async def _find_image(self, text: str) -> _BundleImage:
        repository, reference = self._image_store.names.parse_allowed(text)

        def look(catalogue: ImageQueries) -> ManifestNode | None:
            top = self._image_store.find_manifest(catalogue, repository, reference)
            return self._image_store.build_tree(catalogue, top, repository) if top else None

        node = await self._image_store.query(look)
        if node is None or node.manifest is None:
            reason = node.problem if node else ""
            raise _not_exportable_error(
                repository, reference, reason or "it is not stored; pull or preload it first"
            )
        return _BundleImage(repository, reference, node)

    async def stream(self, bundle: Bundle) -> AsyncGenerator[bytes, None]:
        """Yield the bundle. Raises `StorageError` if a blob is damaged: the rest must not be sent."""
        async with (
            self._open_chunks(bundle) as pieces,
            aclosing(read_ahead(pieces, self._image_store.executor)) as chunks,
        ):
            async for chunk in chunks:
                yield chunk

    async def write(
        self, bundle: Bundle, file: LocalFile, on_progress: Callable[[int], None] = lambda _: None
    ) -> int:
        """Write the bundle into an empty file, and return its size; `progress` is told how far it is.

        Raises `FileUnreachableError` and `StorageError`.
        """
        async with self._open_chunks(bundle) as pieces:
            return await local_file.write_file(
                file, pieces, self._image_store.executor, on_progress
            )

    @asynccontextmanager
    async def _open_chunks(self, bundle: Bundle) -> AsyncIterator[Generator[bytes, None, None]]:
        """Yield the bundle's pieces, for a thread. When they were taken, count the uses."""
        try:
            with closing(self._iterate_chunks(bundle)) as pieces:
                yield pieces
        except _DamagedBlobError as error:
            await self._image_store.space.remove_corrupt(error.digest, error.size)
            raise StorageError(f"{error.digest} {error} on the disk; pull it again") from error
        for digest in bundle.blobs:
            self._image_store.index.touch(digest)

    def _iterate_chunks(self, bundle: Bundle) -> Generator[bytes, None, None]:
        edge = bundle.metadata_entries
        for digest, size in bundle.blobs.items():
            edge += tar.encode_header(layout.blob_path(digest), size)
            for piece in self._read_blob(digest, size):
                yield edge + piece if edge else piece
                edge = b""
            edge += bytes(tar.padding_size(size))
        yield edge + tar.END_OF_ARCHIVE

    def _read_blob(self, digest: Digest, size: int) -> Iterator[bytes]:
        """Yield a blob, hashed: what is damaged has gone out by then, and makes no whole bundle."""
        opened = self._image_store.blob_store.open(digest, size)
        if opened is None:
            raise _DamagedBlobError("is gone, or of another size", digest, size)
        hasher, offset = digest.new_hasher(), 0
        with opened:
            try:
                while piece := os.pread(opened.fd, READ_SIZE, offset):
                    hasher.update(piece)
                    offset += len(piece)
                    yield piece
            except OSError as error:
                raise StorageError(f"the disk cannot be read: {error.strerror}") from error
        if not digest.matches(hasher):
            raise _DamagedBlobError("is damaged, and was removed,", digest, size)


class _DamagedBlobError(Exception):
    """A blob is not what the index says."""

    def __init__(self, reason: str, digest: Digest, size: int) -> None:
        super().__init__(reason)
        self.digest = digest
        self.size = size


def _write_tar_entry(name: str, content: bytes) -> bytes:
    return tar.encode_header(name, len(content)) + content + bytes(tar.padding_size(len(content)))


def _drop_unselected(image: _BundleImage, platforms: Sequence[Platform]) -> ExportedImage:
    """Take out of the image what is not to go out, and say so. Raises `UnknownManifestError`."""
    top = image.node
    asked = top.children if top.manifest and top.manifest.is_index else [top]
    if platforms:
        chosen = {_choose_manifest(image, platform).digest for platform in platforms}
        asked = [
            part for part in asked if any(one.digest in chosen for one in part.platform_manifests())
        ]
    whole = [part for part in asked if not part.all_missing()]
    left_out = _platform_names(part for part in asked if part not in whole)
    there = _platform_names(whole)
    if not there or (platforms and left_out):
        raise _incomplete_error(image, [gone for part in asked for gone in part.all_missing()])
    if top.children:
        top.children = whole
    return ExportedImage(image.name, str(top.digest), there, left_out)


def _choose_manifest(image: _BundleImage, platform: Platform) -> ManifestNode:
    """Return what clients of the platform take, as `check-offline` has it. Raises `UnknownManifestError`."""
    offered = [(one.platform, one) for one in image.node.platform_manifests()]
    if offered == [(None, image.node)]:
        return image.node
    found = choose_platform(offered, platform)
    if found is None:
        named = ", ".join(str(one or "?") for one, _ in offered)
        reason = f"it has no {platform}, only {named}"[:120]
        raise _not_exportable_error(image.repository, image.reference, reason)
    return found


def _platform_names(nodes: Iterable[ManifestNode]) -> list[str]:
    return [str(one.platform or "?") for part in nodes for one in part.platform_manifests()]


def _incomplete_error(image: _BundleImage, missing: Sequence[MissingBlob]) -> UnknownManifestError:
    reason = "nothing of it is stored; pull or preload it first"
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        reason = f"it lacks {missing[0].digest}{more}; preload it first"
    return _not_exportable_error(image.repository, image.reference, reason)


def _not_exportable_error(
    repository: Repository, reference: Reference, reason: str
) -> UnknownManifestError:
    name = display_name(repository, reference)[:70]
    return UnknownManifestError(f"{name} cannot be exported: {reason}")


def _order_blobs(images: Iterable[_BundleImage]) -> dict[Digest, int]:
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


def _to_index_entry(image: _BundleImage) -> LayoutImage:
    node = image.node
    assert node.manifest
    return LayoutImage(
        node.digest,
        node.size,
        node.manifest.media_type,
        image.name,
        "" if isinstance(image.reference, Digest) else str(image.reference),
    )


def _list_docker_images(
    images: Iterable[_BundleImage], blobs: Collection[Digest]
) -> list[DockerImage]:
    """Return what a docker without containerd's store can load: one platform a name, and whole."""
    found: dict[Digest, DockerImage] = {}
    for image in images:
        nodes = [node for node in image.stored_manifests() if _is_docker_loadable(node, blobs)]
        preferred = [node for node in nodes if str(node.platform) == "linux/amd64"]
        for node in (preferred or nodes)[:1]:
            config, *layers = [blob.digest for blob in node.blobs()]
            names = () if isinstance(image.reference, Digest) else (image.name,)
            if config in found:
                names = (*found[config].names, *names)
            found[config] = DockerImage(config, tuple(layers), names)
    return list(found.values())


def _is_docker_loadable(node: ManifestNode, blobs: Collection[Digest]) -> bool:
    assert node.manifest
    children = node.manifest.children
    return children[0].media_type in layout.IMAGE_CONFIG_TYPES and all(
        child.digest in blobs for child in children
    )
