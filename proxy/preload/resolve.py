"""Resolve an image upstream: its manifests, their blobs, and its referrers."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from proxy.cache.listings import ListingCache
from proxy.concurrency import run_in_thread
from proxy.errors import (
    InvalidDigestError,
    InvalidManifestError,
    NotFoundError,
    ProxyError,
    UnknownManifestError,
)
from proxy.images.selection import ALL_PLATFORMS
from proxy.images.tree import MAX_INDEX_DEPTH
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.names import full_name
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.platform import Platform, choose_platform, is_runnable
from proxy.oci.reference import Reference, Repository, Tag
from proxy.preload.request import RequestedImage
from proxy.storage.queries import MAX_CHILDREN
from proxy.upstream.client import Upstream

# Referrers of one manifest. Years of hourly signatures would be more, and clients do not need them.
MAX_REFERRERS = 64
# cosign before 3.0 adds these to `sha256-<hex>`, the fallback tag of the distribution-spec.
COSIGN_TAG_SUFFIXES = (".sig", ".att", ".sbom")

_UNKNOWN_SIZE = -1

# Fetches a manifest through the cache, which stores it.
FetchManifest = Callable[[Repository, Reference], Awaitable[CachedManifest]]

log = get_logger(__name__)


@dataclass(slots=True)
class ResolvedImage:
    """An image with the digests and sizes of everything to fetch for it.

    `platforms` are those chosen from an image index, or "all"; `missing_platforms_error` names
    those that the index lacks. `is_changed` says that the store had another digest under this name.
    """

    requested: RequestedImage
    digest: Digest
    platforms: list[str] = field(default_factory=list)
    manifests: dict[Digest, int] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    referrers: dict[Digest, int] = field(default_factory=dict)
    referrer_blobs: dict[Digest, int] = field(default_factory=dict)
    missing_platforms_error: str = ""
    is_changed: bool = False

    @property
    def repository(self) -> Repository:
        """The repository."""
        return self.requested.repository

    @property
    def reference(self) -> Reference:
        """The tag or digest."""
        return self.requested.reference

    @property
    def name(self) -> str:
        """The display name."""
        return self.requested.name

    @property
    def full_name(self) -> str:
        """The name with registry and namespace, for a lock file."""
        return full_name(self.repository, self.reference)

    @property
    def size(self) -> int:
        """Bytes of the image, without its referrers."""
        return sum(self.manifests.values()) + sum(self.blobs.values())

    def all_content(self) -> dict[Digest, int]:
        """Return digests and sizes of the image and its referrers, in the order of fetching."""
        return self.manifests | self.referrers | self.blobs | self.referrer_blobs

    def add_manifest(self, cached: CachedManifest, manifest: Manifest) -> None:
        """Add a manifest and its blobs."""
        self.manifests[cached.digest] = len(cached.content)
        self.blobs |= _registry_blobs(manifest)

    def add_referrer(self, cached: CachedManifest, manifest: Manifest) -> None:
        """Add a referrer and its blobs."""
        self.referrers[cached.digest] = len(cached.content)
        self.referrer_blobs |= _registry_blobs(manifest)


class ImageResolver:
    """Resolves images by fetching manifests; blobs are only listed."""

    def __init__(
        self, listings: ListingCache, upstreams: Mapping[str, Upstream], executor: Executor
    ) -> None:
        self._listings = listings
        self._upstreams = upstreams
        self._executor = executor

    async def resolve(
        self, image: RequestedImage, platforms: Sequence[Platform], fetch_manifest: FetchManifest
    ) -> ResolvedImage:
        """Return the content for these platforms; without platforms, the whole image.

        Raises `UnknownError`, `UpstreamError` and `InvalidManifestError`.
        """
        cached = await fetch_manifest(image.repository, image.reference)
        manifest = await self._parse(cached)
        resolved = ResolvedImage(image, cached.digest)
        resolved.add_manifest(cached, manifest)
        # A plain manifest states its platform in its config; the offline check compares it later.
        if manifest.is_index:
            await self._add_platforms(resolved, manifest, platforms, fetch_manifest)
        await self._add_referrers(resolved, fetch_manifest)
        await self._ask_unknown_sizes(resolved)
        return resolved

    async def _ask_unknown_sizes(self, image: ResolvedImage) -> None:
        """Ask upstream for the sizes that no manifest states."""
        upstream = self._upstreams[image.repository.upstream]
        for blobs in (image.blobs, image.referrer_blobs):
            for digest in [digest for digest, size in blobs.items() if size == _UNKNOWN_SIZE]:
                size = await upstream.fetch_blob_size(image.repository.name, digest)
                if size is None:
                    raise InvalidManifestError(
                        f"neither manifest nor upstream states the size of {digest}"
                    )
                blobs[digest] = size

    # Image indexes.

    async def _add_platforms(
        self,
        image: ResolvedImage,
        index: Manifest,
        platforms: Sequence[Platform],
        fetch_manifest: FetchManifest,
    ) -> None:
        """Add the manifests of the platforms, and the nested indexes that clients go through."""
        nested, selected = await self._expand_index(
            image.repository, index, fetch_manifest, MAX_INDEX_DEPTH
        )
        if platforms:
            selected, image.missing_platforms_error = _choose_manifests(selected, platforms)
        else:
            image.platforms = [ALL_PLATFORMS]
        if platforms and not selected:
            raise UnknownManifestError(image.missing_platforms_error)
        for cached in nested:
            image.add_manifest(cached, await self._parse(cached))
        for descriptor in dict.fromkeys(selected):
            cached = await fetch_manifest(image.repository, descriptor.digest)
            image.add_manifest(cached, await self._parse(cached))
        if platforms:
            image.platforms = list(dict.fromkeys(str(one.platform) for one in selected))

    async def _expand_index(
        self, repository: Repository, index: Manifest, fetch_manifest: FetchManifest, depth: int
    ) -> tuple[list[CachedManifest], list[Descriptor]]:
        """Return the indexes nested in an index, and the descriptors of all other manifests."""
        nested: list[CachedManifest] = []
        manifests: list[Descriptor] = []
        for child in index.manifests:
            # A child whose type is not stated may be either.
            if depth and child.media_type in {*oci.INDEX_TYPES, ""}:
                cached = await fetch_manifest(repository, child.digest)
                manifest = await self._parse(cached)
                if manifest.is_index:
                    below = await self._expand_index(
                        repository, manifest, fetch_manifest, depth - 1
                    )
                    nested += [cached, *below[0]]
                    manifests += below[1]
                    continue
            manifests.append(child)
        return nested, manifests

    # Referrers.

    async def _add_referrers(self, image: ResolvedImage, fetch_manifest: FetchManifest) -> None:
        """Add signatures, SBOMs and the like; the image is complete without those that fail."""
        for subject in list(image.manifests):
            try:
                await self._add_referrers_of(subject, image, fetch_manifest)
            except ProxyError as error:
                log.info("referrers_failed", image=image.name, reason=str(error))

    async def _add_referrers_of(
        self, subject: Digest, image: ResolvedImage, fetch_manifest: FetchManifest
    ) -> None:
        """Add the referrers of one manifest, from the API or, without one, from the fallback tag.

        cosign's own tags are looked up by HEAD, which no registry counts as a pull.
        """
        # Cut as the distribution-spec says ("Referrers Tag Schema").
        fallback = f"{subject.algorithm}-{subject.hex[:64]}"
        references: list[Reference] = []
        # Shows whether HEAD works, so that its 404 for a tag is believed.
        await self._upstreams[image.repository.upstream].resolve(image.repository.name, subject)
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
        for reference in references[:MAX_REFERRERS]:
            cached = await fetch_manifest(image.repository, reference)
            image.add_referrer(cached, await self._parse(cached))

    async def _tag_exists(self, repository: Repository, tag: Tag) -> bool:
        return await self._upstreams[repository.upstream].has_tag(repository.name, tag)

    async def _parse(self, cached: CachedManifest) -> Manifest:
        manifest = await run_in_thread(
            self._executor, oci.parse_manifest, cached.content, cached.media_type
        )
        if manifest.child_count > MAX_CHILDREN:
            raise InvalidManifestError(
                f"{cached.digest} names {manifest.child_count} blobs; the cache passes such a "
                f"manifest through, and stores those with up to {MAX_CHILDREN}"
            )
        return manifest


def _choose_manifests(
    manifests: Sequence[Descriptor], platforms: Sequence[Platform]
) -> tuple[list[Descriptor], str]:
    """Return the manifests that clients of the platforms take, and an error if some have none."""
    candidates = [(one.platform, one) for one in manifests if is_runnable(one.platform)]
    chosen = {platform: choose_platform(candidates, platform) for platform in platforms}
    error = ""
    if unavailable := ", ".join(str(platform) for platform, one in chosen.items() if one is None):
        offered = dict.fromkeys(str(platform) for platform, _ in candidates if platform)
        error = (
            f"the image is for {', '.join(offered) or 'no platform'} only, not for {unavailable}"
        )
    return [one for one in chosen.values() if one], error


def _registry_blobs(manifest: Manifest) -> dict[Digest, int]:
    """Return the blobs that a registry serves, with their sizes; foreign layers are elsewhere."""
    return {
        blob.digest: _UNKNOWN_SIZE if blob.size is None else blob.size
        for blob in manifest.blobs
        if not blob.is_foreign
    }


def _parse_digests(descriptors: Sequence[Mapping[str, object]]) -> list[Digest]:
    digests = []
    for descriptor in descriptors:
        try:
            digests.append(Digest.parse(str(descriptor.get("digest", ""))))
        except InvalidDigestError:
            continue
    return digests
