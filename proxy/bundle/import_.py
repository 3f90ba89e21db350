"""Import a bundle: a tar of an OCI image layout, from pullcache, skopeo, docker 25+ or hauler.

1. Blobs are verified and stored as they arrive, in any order. They are linked to no repository, so
   no client can pull them yet.
2. When the archive is complete and valid, each image that passes its checks is added in one
   transaction. Blobs stored earlier count, so a bundle may be a delta.
3. What the bundle says about these images is kept, with the bundle as its source.
4. Blobs that no image needs are removed.

An import that breaks off keeps its complete blobs, and a repeated one skips them.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from proxy.bundle.decompress import decompress
from proxy.bundle.facts import BundleFacts
from proxy.bundle.import_checks import (
    check_name,
    check_problems,
    missing_digests,
    select_expected,
)
from proxy.bundle.reader import BundleReader
from proxy.bundle.tar import TarReader
from proxy.concurrency import run_in_thread
from proxy.errors import (
    BundleError,
    DeniedError,
    DigestMismatchError,
    InvalidReferenceError,
    NoSpaceError,
    StorageError,
)
from proxy.images.store import ImageStore
from proxy.images.tree import ManifestNode, build_tree
from proxy.log import get_logger
from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.oci.layout import LayoutImage
from proxy.oci.reference import Reference, Repository, Tag
from proxy.policy.facts import RepositoryFacts
from proxy.storage.image_queries import StoredBlob
from proxy.storage.records.policies import PolicyRecords
from proxy.storage.records.policy_rows import TagMeaning
from proxy.storage.space import Lease

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ImportedImage:
    """The outcome for one image: it was added if no blob is `missing` and there is no `reason`.

    `name` is the display name, or whatever the bundle has instead of a valid one.
    """

    name: str
    digest: str
    missing: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the image was added and can be pulled."""
        return not self.missing and not self.reason


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The outcome of an import.

    `added` blobs with `added_bytes` are new; `already_stored` blobs of the bundle are not. `facts` counts
    the repositories about which the bundle says something; it is None if the bundle has no facts.
    """

    images: list[ImportedImage]
    added: int
    added_bytes: int
    already_stored: int
    facts: int | None = None


class BundleImporter:
    """Imports bundles into one store; several imports may run at once.

    `on_change` is called after images or facts were added; `clock` is Unix time.
    """

    def __init__(
        self,
        image_store: ImageStore,
        clock: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._image_store = image_store
        self._records = PolicyRecords(image_store.index)
        self._clock = clock
        self._on_change = on_change

    async def import_bundle(
        self,
        chunks: AsyncIterator[bytes],
        *,
        default_name: str = "",
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> ImportReport:
        """Import a bundle, compressed or not.

        `default_name` names the image of a bundle that does not; `on_progress` is called with the
        number of bytes read so far, before decompression. Raises `BundleError`,
        `DigestMismatchError` and `StorageError`, and then removes what it added. Any other
        exception, such as a cancellation, leaves complete blobs for the next attempt.
        """
        with self._image_store.space.lease() as lease:
            counted = _count_bytes(chunks, on_progress)
            bundle = await self._read_bundle(counted, lease)
            images, needed = await self._add_images(bundle, default_name)
            failed, needed_by_referrers = await self._add_referrers(bundle, images)
            facts = await self._add_facts(bundle.facts, images) if bundle.facts else None
            images += failed
            needed |= needed_by_referrers
            self._on_change()
            await self._remove_unneeded(bundle, needed, lease)
        added = [size for digest, size in bundle.added_blobs.items() if digest in needed]
        log.info("bundle_imported", images=len(images), blobs=len(added), bytes=sum(added))
        return ImportReport(
            images, len(added), sum(added), len(bundle.digests) - len(bundle.added_blobs), facts
        )

    async def _read_bundle(self, chunks: AsyncIterator[bytes], lease: Lease) -> BundleReader:
        executor, blob_store = self._image_store.executor, self._image_store.blob_store
        directory = await run_in_thread(executor, blob_store.make_import_directory)
        bundle = BundleReader(self._image_store, lease, directory)
        try:
            await bundle.read(TarReader(decompress(chunks, executor)))
        except (BundleError, DigestMismatchError, StorageError):
            await self._remove_unneeded(bundle, set(), lease)
            raise
        finally:
            await run_in_thread(executor, blob_store.remove_import_directory, directory)
        return bundle

    async def _remove_unneeded(
        self, bundle: BundleReader, needed: set[Digest], lease: Lease
    ) -> None:
        """Remove the blobs that the import has added and that no image of the bundle needs."""
        unneeded = bundle.added_blobs.keys() - needed
        lease.digests -= unneeded
        await self._image_store.space.remove_unlinked(unneeded)

    async def _add_images(
        self, bundle: BundleReader, default_name: str
    ) -> tuple[list[ImportedImage], set[Digest]]:
        """Add the images that pass the checks; return all outcomes, and the digests now needed."""
        outcomes: list[ImportedImage] = []
        needed: set[Digest] = set()
        for listed in bundle.images:
            top = StoredBlob(listed.digest, listed.size, listed.media_type, 0)
            tree = await self._image_store.query(partial(build_tree, self._image_store, top=top))
            try:
                check_problems(tree)
            except BundleError as error:
                outcomes.append(_rejected_image(listed.name or listed.tag, listed, error))
                continue
            expected = bundle.details.manifests.get(listed.digest)
            image = select_expected(tree, expected, bundle.digests)
            names = _image_names(listed, image, bundle.docker_names, default_name)
            added = [await self._add_under_name(name, image, listed) for name in names]
            outcomes += added
            if any(outcome.is_complete for outcome in added):
                needed |= _all_digests(image)
        return outcomes, needed

    async def _add_referrers(
        self, bundle: BundleReader, images: Sequence[ImportedImage]
    ) -> tuple[list[ImportedImage], set[Digest]]:
        """Add what refers to the images that were added; return what failed, and what is needed."""
        names = self._image_store.names
        repositories = {names.parse_allowed(one.name)[0] for one in images if one.is_complete}
        failed: list[ImportedImage] = []
        needed: set[Digest] = set()
        for listed in bundle.details.referrers:
            if self._try_parse(listed.name) not in repositories:
                continue
            top = StoredBlob(listed.digest, listed.size, listed.media_type, 0)
            tree = await self._image_store.query(partial(build_tree, self._image_store, top=top))
            try:
                check_problems(tree)
            except BundleError as error:
                failed.append(_rejected_image(listed.name, listed, error))
                continue
            expected = bundle.details.manifests.get(listed.digest)
            referrer = select_expected(tree, expected, bundle.digests)
            added = await self._add_under_name(listed.name, referrer, listed)
            if added.is_complete:
                needed |= _all_digests(referrer)
            else:
                failed.append(added)
        for name, records in bundle.details.records.items():
            repository = self._try_parse(name)
            if repository is not None and repository in repositories:
                await self._image_store.index.set_referrer_records(repository, records)
        return failed, needed

    async def _add_facts(self, said: BundleFacts, images: Sequence[ImportedImage]) -> int:
        """Keep what the bundle says about the images that were added; return about how many repositories.

        Times in the future count as now, so that they are not newer than what Docker Hub says later.
        """
        now = self._clock()
        made_at = min(said.made_at, now)
        source = f"bundle of {datetime.fromtimestamp(made_at, UTC):%Y-%m-%d}"
        added: dict[Repository, set[tuple[Reference | None, str]]] = {}
        for image in images:
            if image.is_complete:
                repository, reference = self._image_store.names.parse_allowed(image.name)
                tag = reference if isinstance(reference, Tag) else None
                added.setdefault(repository, set()).add((tag, image.digest))
        facts: list[tuple[Repository, RepositoryFacts]] = []
        ages: list[tuple[Repository, Tag | None, TagMeaning]] = []
        told: set[Repository] = set()
        for one in said.repositories:
            named = self._try_parse(one.name)
            if named is None or named not in added:
                continue
            if one.facts:
                asked_at = min(one.facts.asked_at, now)
                facts.append((named, replace(one.facts, asked_at=asked_at, source=source)))
                told.add(named)
            for age in one.ages:
                if (age.tag, str(age.digest)) in added[named]:
                    pushed_at = None if age.pushed_at is None else min(age.pushed_at, now)
                    first_seen = min(age.first_seen, now)
                    meaning = TagMeaning(
                        age.digest, first_seen, now, pushed_at, age.is_ripe, source
                    )
                    ages.append((named, age.tag, meaning))
                    told.add(named)
        await self._records.add_bundle_facts(facts, ages)
        return len(told)

    def _try_parse(self, name: str) -> Repository | None:
        with suppress(InvalidReferenceError, DeniedError):
            return self._image_store.names.parse_allowed(name)[0]
        return None

    async def _add_under_name(
        self, name: str, image: ManifestNode, listed: LayoutImage
    ) -> ImportedImage:
        """Add the image under one of its names if it is complete and the name is allowed."""
        if missing := missing_digests(image):
            return ImportedImage(self._try_display_name(name), str(listed.digest), missing)
        try:
            repository, reference = check_name(name, listed.digest, self._image_store.names)
        except (BundleError, InvalidReferenceError, DeniedError) as error:
            return _rejected_image(name or listed.tag, listed, error)
        tag = reference if isinstance(reference, Tag) else None
        manifests = [
            (node.digest, node.size, node.manifest) for node in image.walk() if node.manifest
        ]
        space = self._image_store.space
        children = sum(manifest.child_count for _, _, manifest in manifests)
        reservation = await space.reserve_manifests(0, children)
        if reservation is None:
            raise NoSpaceError(
                f"the index has no space for an image of {children} blobs; raise store.max_size"
            )
        try:
            await self._image_store.index.add_image(repository, tag, listed.digest, manifests)
        finally:
            space.release(reservation)
        return ImportedImage(display_name(repository, reference), str(listed.digest))

    def _try_display_name(self, text: str) -> str:
        with suppress(InvalidReferenceError, DeniedError):
            return display_name(*self._image_store.names.parse_allowed(text))
        return text


def _all_digests(image: ManifestNode) -> set[Digest]:
    """Return the digests of an image's manifests and blobs."""
    nodes = list(image.walk())
    return {
        *(node.digest for node in nodes),
        *(blob.digest for node in nodes for blob in node.blobs()),
    }


def _image_names(
    listed: LayoutImage,
    image: ManifestNode,
    docker_names: Mapping[Digest, list[str]],
    default_name: str,
) -> Sequence[str]:
    """Return the image's names from the most explicit source there is, or "" if no source has one.

    In order: the annotation in `index.json`, docker's `manifest.json`, and the caller's
    `default_name`, completed with the tag from `index.json`.
    """
    if listed.name:
        return [listed.name]
    configs = [blobs[0].digest for node in image.walk() if (blobs := list(node.blobs()))]
    if names := [name for config in configs for name in docker_names.get(config, ())]:
        return names
    has_reference = ":" in default_name.rpartition("/")[2] or "@" in default_name
    if default_name and listed.tag and not has_reference:
        return [f"{default_name}:{listed.tag}"]
    return [default_name]


def _rejected_image(name: str, listed: LayoutImage, error: Exception) -> ImportedImage:
    return ImportedImage(name, str(listed.digest), reason=str(error))


async def _count_bytes(
    chunks: AsyncIterator[bytes], on_progress: Callable[[int], None]
) -> AsyncIterator[bytes]:
    count = 0
    async for chunk in chunks:
        count += len(chunk)
        on_progress(count)
        yield chunk
