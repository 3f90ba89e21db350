"""Bundles into the store: OCI image layouts in a tar, as `export`, skopeo, docker 25 on and hauler write them.

Blobs are verified and committed as they come, in whatever order, and are no use to anybody yet: no
repository is linked to them. An image is entered when the stream has ended well and all of the image is
here, some of it perhaps since long ago, in one transaction. What no image needed goes again. A
transfer that breaks off leaves its blobs, and a repeated one reads over them.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from proxy.bundle.decompress import decompress
from proxy.bundle.reader import BundleReader
from proxy.bundle.tar import TarReader
from proxy.concurrency import run_in_thread
from proxy.errors import (
    BundleError,
    DeniedError,
    DigestMismatchError,
    InvalidReferenceError,
    StorageError,
)
from proxy.images.tree import ImageStore, ManifestNode
from proxy.log import get_logger
from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.oci.layout import LayoutImage
from proxy.oci.reference import Tag
from proxy.storage.image_queries import StoredBlob

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ImportedImage:
    """What became of an image: `name` as people write it, or all that the bundle says.

    It is entered if nothing is `missing` and there is no `reason` against it.
    """

    name: str
    digest: str
    missing: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether it can be pulled now."""
        return not self.missing and not self.reason


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did. `added` blobs of `added_bytes` are new; `already_stored` counts the others."""

    images: list[ImportedImage]
    added: int
    added_bytes: int
    already_stored: int


class BundleImporter:
    """Takes bundles into the store; several may come at once."""

    def __init__(self, image_store: ImageStore) -> None:
        self._image_store = image_store

    async def import_bundle(
        self,
        chunks: AsyncIterator[bytes],
        *,
        default_name: str = "",
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> ImportReport:
        """Import a bundle, compressed or not, and return what became of each of its images.

        `name` is for bundles that name no repository; `progress` is told how many bytes were read, as they
        came. Raises `BundleError`, `DigestMismatchError` and `StorageError`: then the store holds what
        it held before. Whatever else ends it leaves whole blobs behind, for the next attempt.
        """
        contents = self._image_store
        with contents.space.lease() as hold:
            folder = await run_in_thread(
                contents.executor, contents.blob_store.make_import_directory
            )
            intake = BundleReader(contents, hold, folder)
            try:
                await intake.read(
                    TarReader(decompress(_count_bytes(chunks, on_progress), contents.executor))
                )
            except (BundleError, DigestMismatchError, StorageError):
                hold.digests.clear()
                await contents.space.remove_unlinked(intake.added_blobs)
                raise
            finally:
                await run_in_thread(
                    contents.executor, contents.blob_store.remove_import_directory, folder
                )
            images, needed = await self._add_images(intake, default_name)
            surplus = intake.added_blobs.keys() - needed
            hold.digests -= surplus
            await contents.space.remove_unlinked(surplus)
        added = [size for digest, size in intake.added_blobs.items() if digest in needed]
        log.info("bundle_imported", images=len(images), blobs=len(added), bytes=sum(added))
        return ImportReport(
            images, len(added), sum(added), len(intake.digests) - len(intake.added_blobs)
        )

    async def _add_images(
        self, bundle: BundleReader, default_name: str
    ) -> tuple[list[ImportedImage], set[Digest]]:
        """Enter the images that are complete; return what became of each, and what they need."""
        images, needed = [], set[Digest]()
        for listed in bundle.images:
            top = StoredBlob(listed.digest, listed.size, listed.media_type, 0)
            node = await self._image_store.query(partial(self._image_store.build_tree, top=top))
            if problem := next(node.problems(), ""):
                images.append(_rejected_image(listed.name or listed.tag, listed, problem))
                continue
            missing = _select_and_list_missing(node, bundle)
            for text in _list_names(listed, node, bundle.docker_names, default_name):
                if missing:
                    name = self._format_name(text)
                    images.append(ImportedImage(name, str(listed.digest), missing))
                else:
                    images.append(await self._add_image(text, node, listed))
            if images[-1].is_complete:
                needed.update(one.digest for one in node.walk())
                needed.update(blob.digest for one in node.walk() for blob in one.blobs())
        return images, needed

    def _format_name(self, text: str) -> str:
        with suppress(InvalidReferenceError, DeniedError):
            return display_name(*self._image_store.names.parse_allowed(text))
        return text

    async def _add_image(self, text: str, node: ManifestNode, entry: LayoutImage) -> ImportedImage:
        if not text:
            reason = "the bundle does not say which repository it is of: say it with --name"
            return _rejected_image(entry.tag, entry, reason)
        try:
            repository, reference = self._image_store.names.parse_allowed(text)
        except (InvalidReferenceError, DeniedError) as error:
            return _rejected_image(text, entry, str(error))
        tag = reference if isinstance(reference, Tag) else None
        if tag is None and reference != entry.digest:
            return _rejected_image(text, entry, f"the bundle has {entry.digest} under this name")
        manifests = [(one.digest, one.size, one.manifest) for one in node.walk() if one.manifest]
        await self._image_store.index.add_image(repository, tag, entry.digest, manifests)
        return ImportedImage(display_name(repository, reference), str(entry.digest))


async def _count_bytes(
    chunks: AsyncIterator[bytes], on_progress: Callable[[int], None]
) -> AsyncIterator[bytes]:
    read = 0
    async for chunk in chunks:
        read += len(chunk)
        on_progress(read)
        yield chunk


def _select_and_list_missing(node: ManifestNode, bundle: BundleReader) -> list[str]:
    """Return what the image lacks, after taking out of an index what is not meant to be here.

    Meant is what the bundle says; if it says nothing, the manifests that it holds; if it holds none,
    those that are whole in the store.
    """
    if node.manifest is None or not node.manifest.is_index:
        return [gone.digest for gone in node.missing]
    meant = bundle.expected_manifests.get(node.digest, bundle.digests)
    chosen = [child for child in node.children if child.digest in meant]
    node.children = chosen or [child for child in node.children if not child.all_missing()]
    if node.children:
        return [gone.digest for gone in node.all_missing()]
    return [str(child.digest) for child in node.manifest.children]


def _list_names(
    entry: LayoutImage,
    node: ManifestNode,
    docker_names: Mapping[Digest, list[str]],
    default_name: str,
) -> Sequence[str]:
    """Return what the image is called, by whoever says it most clearly; "" if nobody does."""
    if entry.name:
        return [entry.name]
    configs = [next(one.blobs()).digest for one in node.walk() if any(one.blobs())]
    if names := [name for config in configs for name in docker_names.get(config, ())]:
        return names
    has_reference = ":" in default_name.rpartition("/")[2] or "@" in default_name
    return [
        f"{default_name}:{entry.tag}"
        if default_name and entry.tag and not has_reference
        else default_name
    ]


def _rejected_image(name: str, entry: LayoutImage, reason: str) -> ImportedImage:
    return ImportedImage(name, str(entry.digest), reason=reason)
