"""Resolve an image upstream: its manifests and their blobs."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from proxy.errors import (
    InvalidManifestError,
    UnknownManifestError,
)
from proxy.images.selection import ALL_PLATFORMS
from proxy.images.tree import MAX_INDEX_DEPTH
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.oci import manifest as oci
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.platform import Platform, choose_platform, is_runnable
from proxy.oci.reference import Reference, Repository
from proxy.parsing import DocumentParser
from proxy.preload.fetcher import parse_manifest
from proxy.preload.request import RequestedImage
from proxy.preload.resolved import UNKNOWN_SIZE, ResolvedImage
from proxy.upstream.client import Upstream

# Fetches a manifest through the cache, which stores it.
FetchManifest = Callable[[Repository, Reference], Awaitable[CachedManifest]]

log = get_logger(__name__)


class ImageResolver:
    """Resolves images by fetching manifests; blobs are only listed."""

    def __init__(self, upstreams: Mapping[str, Upstream], parser: DocumentParser) -> None:
        self._upstreams = upstreams
        self._parser = parser

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
        await self._ask_unknown_sizes(resolved)
        return resolved

    async def _ask_unknown_sizes(self, image: ResolvedImage) -> None:
        """Ask upstream for the sizes that no manifest states."""
        upstream = self._upstreams[image.repository.upstream]
        for digest in [digest for digest, size in image.blobs.items() if size == UNKNOWN_SIZE]:
            size = await upstream.fetch_blob_size(image.repository.name, digest)
            if size is None:
                raise InvalidManifestError(
                    f"neither manifest nor upstream states the size of {digest}"
                )
            image.blobs[digest] = size

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
            attestations = [child for child in selected if child.attested]
            selected, image.missing_platforms_error = _choose_manifests(selected, platforms)
            chosen = {child.digest for child in selected}
            image.attestations = [child for child in attestations if child.attested in chosen]
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

    async def _parse(self, cached: CachedManifest) -> Manifest:
        return await parse_manifest(self._parser, cached.content, cached.media_type)


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
