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

from proxy.bundle.decompress import unpacked
from proxy.bundle.intake import Intake
from proxy.bundle.tar import TarStream
from proxy.concurrency import in_thread
from proxy.errors import (
    BundleError,
    DeniedError,
    DigestMismatchError,
    InvalidReferenceError,
    StorageError,
)
from proxy.images.tree import Contents, Node
from proxy.log import get_logger
from proxy.names import spell
from proxy.oci.digest import Digest
from proxy.oci.layout import Listed
from proxy.oci.reference import Tag
from proxy.storage.image_queries import Blob

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Imported:
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
class Report:
    """What an import did. `added` blobs of `added_bytes` are new, `known` ones were here before."""

    images: list[Imported]
    added: int
    added_bytes: int
    known: int


class Importer:
    """Takes bundles into the store; several may come at once."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    async def take(
        self,
        chunks: AsyncIterator[bytes],
        *,
        name: str = "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> Report:
        """Import a bundle, compressed or not, and return what became of each of its images.

        `name` is for bundles that name no repository; `progress` is told how many bytes were read, as they
        came. Raises `BundleError`, `DigestMismatchError` and `StorageError`: then the store holds what
        it held before. Whatever else ends it leaves whole blobs behind, for the next attempt.
        """
        contents = self._contents
        with contents.space.hold() as hold:
            folder = await in_thread(contents.threads, contents.store.make_folder)
            intake = Intake(contents, hold, folder)
            try:
                await intake.read(TarStream(unpacked(_counted(chunks, progress), contents.threads)))
            except (BundleError, DigestMismatchError, StorageError):
                hold.digests.clear()
                await contents.space.remove(intake.added)
                raise
            finally:
                await in_thread(contents.threads, contents.store.remove_folder, folder)
            images, needed = await self._enter(intake, name)
            surplus = intake.added.keys() - needed
            hold.digests -= surplus
            await contents.space.remove(surplus)
        added = [size for digest, size in intake.added.items() if digest in needed]
        log.info("imported", images=len(images), blobs=len(added), bytes=sum(added))
        return Report(images, len(added), sum(added), len(intake.seen) - len(intake.added))

    async def _enter(self, intake: Intake, given: str) -> tuple[list[Imported], set[Digest]]:
        """Enter the images that are complete; return what became of each, and what they need."""
        images, needed = [], set[Digest]()
        for listed in intake.images:
            top = Blob(listed.digest, listed.size, listed.media_type, 0)
            node = await self._contents.read(partial(self._contents.closure, top=top))
            if problem := next(node.problems(), ""):
                images.append(_refused(listed.name or listed.tag, listed, problem))
                continue
            missing = _missing(node, intake)
            for text in _names(listed, node, intake.docker_names, given):
                if missing:
                    name = self._spelled(text)
                    images.append(Imported(name, str(listed.digest), missing))
                else:
                    images.append(await self._enter_one(text, node, listed))
            if images[-1].is_complete:
                needed.update(one.digest for one in node.walk())
                needed.update(blob.digest for one in node.walk() for blob in one.blobs())
        return images, needed

    def _spelled(self, text: str) -> str:
        with suppress(InvalidReferenceError, DeniedError):
            return spell(*self._contents.names.parse(text))
        return text

    async def _enter_one(self, text: str, node: Node, listed: Listed) -> Imported:
        if not text:
            reason = "the bundle does not say which repository it is of: say it with --name"
            return _refused(listed.tag, listed, reason)
        try:
            repository, reference = self._contents.names.parse(text)
        except (InvalidReferenceError, DeniedError) as error:
            return _refused(text, listed, str(error))
        tag = reference if isinstance(reference, Tag) else None
        if tag is None and reference != listed.digest:
            return _refused(text, listed, f"the bundle has {listed.digest} under this name")
        manifests = [(one.digest, one.size, one.manifest) for one in node.walk() if one.manifest]
        await self._contents.index.add_image(repository, tag, listed.digest, manifests)
        return Imported(spell(repository, reference), str(listed.digest))


async def _counted(
    chunks: AsyncIterator[bytes], progress: Callable[[int], None]
) -> AsyncIterator[bytes]:
    read = 0
    async for chunk in chunks:
        read += len(chunk)
        progress(read)
        yield chunk


def _missing(node: Node, intake: Intake) -> list[str]:
    """Return what the image lacks, after taking out of an index what is not meant to be here.

    Meant is what the bundle says; if it says nothing, the manifests that it holds; if it holds none,
    those that are whole in the store.
    """
    if node.manifest is None or not node.manifest.is_index:
        return [gone.digest for gone in node.missing]
    meant = intake.meant.get(node.digest, intake.seen)
    chosen = [child for child in node.children if child.digest in meant]
    node.children = chosen or [child for child in node.children if not child.lacking()]
    if node.children:
        return [gone.digest for gone in node.lacking()]
    return [str(child.digest) for child in node.manifest.children]


def _names(
    listed: Listed, node: Node, docker: Mapping[Digest, list[str]], given: str
) -> Sequence[str]:
    """Return what the image is called, by whoever says it most clearly; "" if nobody does."""
    if listed.name:
        return [listed.name]
    configs = [next(one.blobs()).digest for one in node.walk() if any(one.blobs())]
    if names := [name for config in configs for name in docker.get(config, ())]:
        return names
    has_reference = ":" in given.rpartition("/")[2] or "@" in given
    return [f"{given}:{listed.tag}" if given and listed.tag and not has_reference else given]


def _refused(name: str, listed: Listed, reason: str) -> Imported:
    return Imported(name, str(listed.digest), reason=reason)
