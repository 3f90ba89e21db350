"""What an image is upstream now: its manifests for some platforms, what they name, and what refers to them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from proxy.cache.tags import Listings
from proxy.concurrency import in_thread
from proxy.errors import InvalidDigestError, ProxyError, UnknownError, UnknownManifestError
from proxy.images.check import ALL
from proxy.images.tree import MAX_DEPTH
from proxy.log import get_logger
from proxy.lru import Held
from proxy.names import spell
from proxy.oci import manifest as oci
from proxy.oci.digest import Digest
from proxy.oci.manifest import Child, Manifest, Platform
from proxy.oci.platform import choose, is_image
from proxy.oci.reference import Reference, Repository, Tag
from proxy.upstream.client import Upstream

# So much may refer to one manifest; who signs hourly for years has more, and nobody wants it.
MAX_REFERRERS = 64
# What cosign before 3.0 appends to `sha256-<hex>`, the fallback tag of the specification.
COSIGN = (".sig", ".att", ".sbom")

# Returns what a reference names now; in the store it is kept.
Pull = Callable[[Repository, Reference], Awaitable[Held]]

log = get_logger(__name__)


@dataclass(slots=True)
class Found:
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
    extras: dict[Digest, int] = field(default_factory=dict)
    lacking: str = ""
    is_new: bool = False

    @property
    def name(self) -> str:
        """The name as people write it."""
        return spell(self.repository, self.reference)

    @property
    def size(self) -> int:
        """Bytes of the image itself, without what refers to it."""
        return sum(self.manifests.values()) + sum(self.blobs.values())

    def contents(self) -> dict[Digest, int]:
        """Return all there is, in the order in which it is fetched."""
        return self.manifests | self.referrers | self.blobs | self.extras


class Resolver:
    """Finds out what images are, by fetching manifests and nothing else."""

    def __init__(
        self, listings: Listings, upstreams: Mapping[str, Upstream], threads: Executor
    ) -> None:
        self._listings = listings
        self._upstreams = upstreams
        self._threads = threads

    async def resolve(
        self,
        repository: Repository,
        reference: Reference,
        platforms: Sequence[Platform],
        pull: Pull,
    ) -> Found:
        """Return what clients of the platforms take of an image; without any, everything it has.

        Raises `UnknownError`, `UpstreamError`, and `InvalidManifestError`.
        """
        top = await pull(repository, reference)
        found = Found(repository, reference, top.digest)
        for held, platform in await self._chosen(found, top, platforms, pull):
            manifest = await self._parsed(held)
            found.manifests[held.digest] = len(held.content)
            if not manifest.is_index:
                found.blobs |= _blobs(manifest)
            if platforms and platform and str(platform) not in found.platforms:
                found.platforms.append(str(platform))
        await self._add_referrers(found, pull)
        return found

    async def _chosen(
        self, found: Found, top: Held, platforms: Sequence[Platform], pull: Pull
    ) -> list[tuple[Held, Platform | None]]:
        """Return the manifests that are wanted, those of indexes on the way to them included."""
        manifest = await self._parsed(top)
        if not manifest.is_index:
            # For whom it is stands in its configuration; who asks for another will be told.
            return [(top, None)]
        found.platforms = [] if platforms else [ALL]
        chosen: list[tuple[Held, Platform | None]] = [(top, None)]
        offers = [
            (child.platform, child)
            async for child in self._offers(found.repository, manifest, pull, chosen, MAX_DEPTH)
        ]
        wanted = offers
        if platforms:
            images = [(one, child) for one, child in offers if is_image(one)]
            taken = [(one, choose(images, one)) for one in platforms]
            named = ", ".join(dict.fromkeys(str(one) for one, _ in images if one)) or "no platform"
            lacking = ", ".join(str(one) for one, child in taken if child is None)
            if lacking:
                found.lacking = f"the image is for {named} only, not for {lacking}"
            wanted = [(child.platform, child) for _, child in taken if child]
        if not wanted:
            raise UnknownManifestError(found.lacking or "the image names no platform at all")
        for platform, child in dict.fromkeys(wanted):
            held = await pull(found.repository, child.digest)
            chosen.append((held, platform if is_image(platform) else None))
        return chosen

    async def _offers(
        self,
        repository: Repository,
        index: Manifest,
        pull: Pull,
        indexes: list[tuple[Held, Platform | None]],
        depth: int,
    ) -> AsyncIterator[Child]:
        """Yield the manifests of an index; an index in it is fetched, and looked into."""
        for child in index.children:
            if depth and child.media_type in oci.INDEX_TYPES:
                held = await pull(repository, child.digest)
                indexes.append((held, None))
                inner = self._offers(repository, await self._parsed(held), pull, indexes, depth - 1)
                async for below in inner:
                    yield below
            else:
                yield child

    async def _add_referrers(self, found: Found, pull: Pull) -> None:
        """Add signatures, SBOMs and the like. Where they cannot be had, the image is whole without."""
        for subject in list(found.manifests):
            try:
                for reference in await self._referring(found, subject, pull):
                    held = await pull(found.repository, reference)
                    manifest = await self._parsed(held)
                    found.referrers[held.digest] = len(held.content)
                    if not manifest.is_index:
                        found.extras |= _blobs(manifest)
            except ProxyError as error:
                log.info("referrers_failed", image=found.name, reason=str(error))

    async def _referring(self, found: Found, subject: Digest, pull: Pull) -> list[Reference]:
        """Return what refers to a manifest: by the API, or where there is none by the fallback tag.

        Cosign's own tags are asked for by HEAD, which no registry counts as a pull.
        """
        # As long as the specification lets it be ("Referrers Tag Schema").
        fallback = f"{subject.algorithm}-{subject.hex[:64]}"
        references: list[Reference] = []
        try:
            descriptors, _ = await self._listings.referrers(found.repository, subject)
            references += _digests(descriptors)
        except UnknownError:
            if await self._exists(found.repository, Tag(fallback)):
                index = await pull(found.repository, Tag(fallback))
                found.referrers[index.digest] = len(index.content)
                references += [child.digest for child in (await self._parsed(index)).children]
        if subject == found.digest:
            tags = [Tag(f"{fallback}{suffix}") for suffix in COSIGN]
            references += [tag for tag in tags if await self._exists(found.repository, tag)]
        return references[:MAX_REFERRERS]

    async def _exists(self, repository: Repository, tag: Tag) -> bool:
        try:
            await self._upstreams[repository.upstream].resolve(repository.name, tag)
        except UnknownError:
            return False
        return True

    async def _parsed(self, held: Held) -> Manifest:
        return await in_thread(self._threads, oci.parse, held.content, held.media_type)


def _blobs(manifest: Manifest) -> dict[Digest, int]:
    """Return what a registry holds of an image: foreign layers come from elsewhere."""
    return {child.digest: child.size for child in manifest.children if not child.is_foreign}


def _digests(descriptors: Sequence[Mapping[str, object]]) -> list[Digest]:
    digests = []
    for descriptor in descriptors:
        try:
            digests.append(Digest.parse(str(descriptor.get("digest", ""))))
        except InvalidDigestError:
            continue
    return digests
