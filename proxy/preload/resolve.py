"""What an image is upstream now: its manifests for some platforms, what they name, and what refers to them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from proxy.cache.listings import ListingCache
from proxy.concurrency import run_in_thread
from proxy.errors import InvalidDigestError, NotFoundError, ProxyError, UnknownManifestError
from proxy.images.check import ALL_PLATFORMS
from proxy.images.tree import MAX_INDEX_DEPTH
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.names import display_name
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.platform import Platform, choose_platform, is_runnable
from proxy.oci.reference import Reference, Repository, Tag
from proxy.upstream.client import Upstream

# So much may refer to one manifest; who signs hourly for years has more, and nobody wants it.
MAX_REFERRERS = 64
# What cosign before 3.0 appends to `sha256-<hex>`, the fallback tag of the specification.
COSIGN_TAG_SUFFIXES = (".sig", ".att", ".sbom")

# Returns what a reference names now; in the store it is kept.
FetchManifest = Callable[[Repository, Reference], Awaitable[CachedManifest]]

log = get_logger(__name__)


@dataclass(slots=True)
class ResolvedImage:
    """An image. `manifests` and `blobs` are digests with sizes; `extras` are blobs of what refers to it.

    `platforms` are those of an index that were chosen, or "all". `lacking` says which platforms it does not have; `is_new` that its name stood for something else here.
    """

    repository: Repository
    reference: Reference
    digest: Digest
    platforms: list[str] = field(default_factory=list)
    manifests: dict[Digest, int] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    referrers: dict[Digest, int] = field(default_factory=dict)
    referrer_blobs: dict[Digest, int] = field(default_factory=dict)
    missing_platforms_error: str = ""
    is_changed: bool = False

    @property
    def name(self) -> str:
        """The name as people write it."""
        return display_name(self.repository, self.reference)

    @property
    def size(self) -> int:
        """Bytes of the image itself, without what refers to it."""
        return sum(self.manifests.values()) + sum(self.blobs.values())

    def all_content(self) -> dict[Digest, int]:
        """Return all there is, in the order in which it is fetched."""
        return self.manifests | self.referrers | self.blobs | self.referrer_blobs


class ImageResolver:
    """Finds out what images are, by fetching manifests and nothing else."""

    def __init__(
        self, listings: ListingCache, upstreams: Mapping[str, Upstream], executor: Executor
    ) -> None:
        self._listings = listings
        self._upstreams = upstreams
        self._executor = executor

    async def resolve(
        self,
        repository: Repository,
        reference: Reference,
        platforms: Sequence[Platform],
        fetch_manifest: FetchManifest,
    ) -> ResolvedImage:
        """Return what clients of the platforms take of an image; without any, everything it has.

        Raises `UnknownError`, `UpstreamError`, and `InvalidManifestError`.
        """
        top = await fetch_manifest(repository, reference)
        found = ResolvedImage(repository, reference, top.digest)
        for held, platform in await self._select_manifests(found, top, platforms, fetch_manifest):
            manifest = await self._parse(held)
            found.manifests[held.digest] = len(held.content)
            if not manifest.is_index:
                found.blobs |= _registry_blobs(manifest)
            if platforms and platform and str(platform) not in found.platforms:
                found.platforms.append(str(platform))
        await self._add_referrers(found, fetch_manifest)
        return found

    async def _select_manifests(
        self,
        image: ResolvedImage,
        top: CachedManifest,
        platforms: Sequence[Platform],
        fetch_manifest: FetchManifest,
    ) -> list[tuple[CachedManifest, Platform | None]]:
        """Return the manifests that are wanted, those of indexes on the way to them included."""
        manifest = await self._parse(top)
        if not manifest.is_index:
            # For whom it is stands in its configuration; who asks for another will be told.
            return [(top, None)]
        image.platforms = [] if platforms else [ALL_PLATFORMS]
        chosen: list[tuple[CachedManifest, Platform | None]] = [(top, None)]
        offers = [
            (child.platform, child)
            async for child in self._iterate_manifests(
                image.repository, manifest, fetch_manifest, chosen, MAX_INDEX_DEPTH
            )
        ]
        wanted = offers
        if platforms:
            images = [(one, child) for one, child in offers if is_runnable(one)]
            taken = [(one, choose_platform(images, one)) for one in platforms]
            named = ", ".join(dict.fromkeys(str(one) for one, _ in images if one)) or "no platform"
            lacking = ", ".join(str(one) for one, child in taken if child is None)
            if lacking:
                image.missing_platforms_error = f"the image is for {named} only, not for {lacking}"
            wanted = [(child.platform, child) for _, child in taken if child]
        if not wanted:
            raise UnknownManifestError(
                image.missing_platforms_error or "the image names no platform at all"
            )
        for platform, child in dict.fromkeys(wanted):
            held = await fetch_manifest(image.repository, child.digest)
            chosen.append((held, platform if is_runnable(platform) else None))
        return chosen

    async def _iterate_manifests(
        self,
        repository: Repository,
        index: Manifest,
        fetch_manifest: FetchManifest,
        indexes: list[tuple[CachedManifest, Platform | None]],
        depth: int,
    ) -> AsyncIterator[Descriptor]:
        """Yield the manifests of an index; an index in it is fetched, and looked into."""
        for child in index.children:
            if depth and child.media_type in oci.INDEX_TYPES:
                held = await fetch_manifest(repository, child.digest)
                indexes.append((held, None))
                inner = self._iterate_manifests(
                    repository, await self._parse(held), fetch_manifest, indexes, depth - 1
                )
                async for below in inner:
                    yield below
            else:
                yield child

    async def _add_referrers(self, image: ResolvedImage, fetch_manifest: FetchManifest) -> None:
        """Add signatures, SBOMs and the like. Where they cannot be had, the image is whole without."""
        for subject in list(image.manifests):
            try:
                for reference in await self._list_referrers(image, subject, fetch_manifest):
                    held = await fetch_manifest(image.repository, reference)
                    manifest = await self._parse(held)
                    image.referrers[held.digest] = len(held.content)
                    if not manifest.is_index:
                        image.referrer_blobs |= _registry_blobs(manifest)
            except ProxyError as error:
                log.info("referrers_failed", image=image.name, reason=str(error))

    async def _list_referrers(
        self, image: ResolvedImage, subject: Digest, fetch_manifest: FetchManifest
    ) -> list[Reference]:
        """Return what refers to a manifest: by the API, or where there is none by the fallback tag.

        Cosign's own tags are asked for by HEAD, which no registry counts as a pull.
        """
        # As long as the specification lets it be ("Referrers Tag Schema").
        fallback = f"{subject.algorithm}-{subject.hex[:64]}"
        references: list[Reference] = []
        try:
            descriptors, _ = await self._listings.list_referrers(image.repository, subject)
            references += _parse_digests(descriptors)
        except NotFoundError:
            if await self._tag_exists(image.repository, Tag(fallback)):
                index = await fetch_manifest(image.repository, Tag(fallback))
                image.referrers[index.digest] = len(index.content)
                references += [child.digest for child in (await self._parse(index)).children]
        if subject == image.digest:
            tags = [Tag(f"{fallback}{suffix}") for suffix in COSIGN_TAG_SUFFIXES]
            references += [tag for tag in tags if await self._tag_exists(image.repository, tag)]
        return references[:MAX_REFERRERS]

    async def _tag_exists(self, repository: Repository, tag: Tag) -> bool:
        try:
            await self._upstreams[repository.upstream].resolve(repository.name, tag)
        except NotFoundError:
            return False
        return True

    async def _parse(self, cached_manifest: CachedManifest) -> Manifest:
        return await run_in_thread(
            self._executor, oci.parse_manifest, cached_manifest.content, cached_manifest.media_type
        )


def _registry_blobs(manifest: Manifest) -> dict[Digest, int]:
    """Return what a registry holds of an image: foreign layers come from elsewhere."""
    return {child.digest: child.size for child in manifest.children if not child.is_foreign}


def _parse_digests(descriptors: Sequence[Mapping[str, object]]) -> list[Digest]:
    digests = []
    for descriptor in descriptors:
        try:
            digests.append(Digest.parse(str(descriptor.get("digest", ""))))
        except InvalidDigestError:
            continue
    return digests
