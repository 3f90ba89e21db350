"""Resolve what refers to an image: signatures, SBOMs and the like.

Each referrer is resolved by itself, and a failure is recorded instead of raised: the image is complete
without it, but whoever runs the preload has to know. What upstream says it does not have, by whatever
status, does not exist.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from proxy.cache.listings import ListingCache
from proxy.errors import (
    InvalidManifestError,
    NotFoundError,
    ProxyError,
    RateLimitedError,
    UnknownManifestError,
    UpstreamDownError,
)
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import (
    RawDescriptor,
    ReferrerRecord,
    cosign_tags,
    fallback_tag,
    parse_descriptor_digest,
)
from proxy.preload.fetcher import PreloadFetcher
from proxy.preload.resolved import (
    UNKNOWN_SIZE,
    ImageReferrers,
    MissingReferrer,
    ResolvedImage,
    registry_blobs,
)
from proxy.upstream.client import FetchedManifest, Upstream

# Referrers of one image, and how far they may refer to each other: a signature of an SBOM of an image.
MAX_REFERRERS = 256
MAX_REFERRER_DEPTH = 3
# Children of a fallback index that are read to see whether it is one.
MAX_CHECKED_CHILDREN = 4
# A referrer is not worth a long wait, unlike the image: attempts, and the longest pause in seconds
# between them, if upstream limits requests or is down.
REFERRER_ATTEMPTS = 3
MAX_REFERRER_PAUSE = 5.0

T = TypeVar("T")

log = get_logger(__name__)


class ReferrerResolver:
    """Resolves the referrers of images for one preload; blobs are only listed."""

    def __init__(
        self, listings: ListingCache, upstreams: Mapping[str, Upstream], fetcher: PreloadFetcher
    ) -> None:
        self._listings = listings
        self._upstreams = upstreams
        self._fetcher = fetcher

    async def resolve(self, image: ResolvedImage) -> ImageReferrers:
        """Return what refers to the manifests of an image, and to that in turn."""
        upstream = self._upstreams[image.repository.upstream]
        # Shows whether HEAD works, so that its 404 for a tag is believed.
        with suppress(ProxyError):
            await upstream.probe_head(image.repository.name, image.digest)
        search = _ReferrerSearch(image.repository, upstream, self._listings, self._fetcher)
        for child in image.attestations[:MAX_REFERRERS]:
            assert child.attested
            await search.add(child.attested, child.digest)
        subjects = list(image.manifests)
        for depth in range(MAX_REFERRER_DEPTH):
            for subject in subjects:
                await search.add_referrers_of(subject, is_of_image=not depth)
            subjects = search.take_added()
        for subject in subjects:
            await search.expect_no_referrers_of(subject)
        return search.found


class _ReferrerSearch:
    """The search for the referrers of one image."""

    def __init__(
        self,
        repository: Repository,
        upstream: Upstream,
        listings: ListingCache,
        fetcher: PreloadFetcher,
    ) -> None:
        self.found = ImageReferrers()
        self._repository = repository
        self._upstream = upstream
        self._listings = listings
        self._fetcher = fetcher
        self._added: list[Digest] = []

    def take_added(self) -> list[Digest]:
        """Return the referrers that were added since the last call."""
        added, self._added = self._added, []
        return added

    async def add_referrers_of(self, subject: Digest, *, is_of_image: bool) -> None:
        """Add the referrers of one manifest, from the API or the fallback tag, and cosign's tags.

        cosign's tags are for manifests of images.
        """
        missing_before = len(self.found.missing)
        descriptors, tags = await self._list_referrers(subject)
        own_tags = await self._existing_tags(subject) if is_of_image else []
        digests = dict.fromkeys(filter(None, map(parse_descriptor_digest, descriptors)))
        references: list[Reference] = [*own_tags]
        references += [digest for digest in digests if digest not in self.found.manifests]
        room = MAX_REFERRERS - len(self.found.manifests)
        if len(references) > room:
            reason = f"of {len(references)} only {room} are fetched: {MAX_REFERRERS} of an image"
            self._record_missing(subject, "", reason)
        if len(self.found.missing) == missing_before:
            self.found.records[subject] = ReferrerRecord(
                descriptors, [str(tag) for tag in (*tags, *own_tags)]
            )
        for reference in references[:room]:
            await self.add(subject, reference)

    async def expect_no_referrers_of(self, subject: Digest) -> None:
        """Record that a manifest at the last level has no referrers, or that they are missing."""
        missing_before = len(self.found.missing)
        descriptors, tags = await self._list_referrers(subject)
        if descriptors:
            reason = f"only {MAX_REFERRER_DEPTH} levels of referrers are fetched"
            self._record_missing(subject, "", reason)
        elif len(self.found.missing) == missing_before:
            self.found.records[subject] = ReferrerRecord([], [str(tag) for tag in tags])

    async def add(self, subject: Digest, reference: Reference) -> None:
        """Fetch a referrer and add it, or record why it is missing, unless upstream lacks it."""
        try:
            cached, blobs = await _try_briefly(lambda: self._fetch(reference))
        except NotFoundError as error:
            # The list is out of date.
            log.info("referrer_gone", referrer=str(reference), reason=str(error))
        except ProxyError as error:
            self._record_missing(subject, reference, str(error))
        else:
            self.found.add(subject, str(reference), cached, blobs)
            self._added.append(cached.digest)

    async def _fetch(self, reference: Reference) -> tuple[CachedManifest, dict[Digest, int]]:
        """Store a referrer; return it and its blobs with their sizes."""
        cached = await self._fetcher.fetch_manifest(self._repository, reference)
        if not self._fetcher.stored_digest(self._repository, cached.digest):
            raise InvalidManifestError("it cannot be stored")
        blobs = registry_blobs(await self._fetcher.parse(cached.content, cached.media_type))
        for digest in [digest for digest, size in blobs.items() if size == UNKNOWN_SIZE]:
            size = await self._upstream.fetch_blob_size(self._repository.name, digest)
            if size is None:
                raise InvalidManifestError(f"the size of {digest} is unknown")
            blobs[digest] = size
        return cached, blobs

    async def _list_referrers(self, subject: Digest) -> tuple[list[RawDescriptor], list[Tag]]:
        """Return the descriptors of the referrers, and the fallback tag if they are listed there."""
        listings = self._listings
        try:
            listed = await _try_briefly(
                lambda: listings.get_current_referrers(self._repository, subject)
            )
        except UnknownManifestError:
            pass  # no API, or no list of this manifest
        except ProxyError as error:
            self._record_missing(subject, "", str(error))
        else:
            return listed, []
        return await self._list_by_fallback_tag(subject)

    async def _list_by_fallback_tag(self, subject: Digest) -> tuple[list[RawDescriptor], list[Tag]]:
        tag = fallback_tag(subject)
        try:
            fetched = await _try_briefly(lambda: self._fetch_fallback_index(subject, tag))
        except NotFoundError:
            return [], []
        except ProxyError as error:
            self._record_missing(subject, tag, str(error))
            return [], []
        if fetched is None:
            return [], []
        descriptors = await self._fetcher.parse_fallback_index(fetched.content)
        if not await self._is_fallback_index(subject, descriptors):
            return [], []
        cached = await self._fetcher.store_manifest(self._repository, tag, fetched)
        self.found.manifests[cached.digest] = len(cached.content)
        return descriptors, [tag]

    async def _fetch_fallback_index(self, subject: Digest, tag: Tag) -> FetchedManifest | None:
        """Return what the fallback tag names, not stored yet; None if there is no index."""
        resolved = await self._upstream.find_tag(self._repository.name, tag)
        # GitLab resolves the tag to the subject itself.
        if resolved is None or resolved.digest == subject:
            return None
        return resolved.manifest or await self._fetcher.peek_manifest(
            self._repository, resolved.digest or tag
        )

    async def _is_fallback_index(
        self, subject: Digest, descriptors: Sequence[RawDescriptor]
    ) -> bool:
        """Tell whether an index lists referrers of the subject, and is not just some image.

        Its children are looked at before anything is stored, which would then be listed as images.
        """
        digests = [digest for item in descriptors if (digest := parse_descriptor_digest(item))]
        if subject in digests:
            return False
        for digest in digests[:MAX_CHECKED_CHILDREN]:
            try:
                child = await self._read_child(digest)
            except NotFoundError:
                continue
            except ProxyError:
                return True  # its own fetch tells what is wrong
            if child.subject == subject:
                return True
        return not digests

    async def _read_child(self, digest: Digest) -> Manifest:
        if self._fetcher.stored_digest(self._repository, digest):
            cached = await self._fetcher.fetch_manifest(self._repository, digest)
            return await self._fetcher.parse(cached.content, cached.media_type)
        fetched = await _try_briefly(lambda: self._fetcher.peek_manifest(self._repository, digest))
        return await self._fetcher.parse(fetched.content, fetched.content_type)

    async def _existing_tags(self, subject: Digest) -> list[Tag]:
        """Return those of cosign's tags that upstream has, asked by HEAD, which costs no pull."""
        name, find_tag = self._repository.name, self._upstream.find_tag

        async def exists(tag: Tag) -> bool:
            try:
                return await _try_briefly(lambda: find_tag(name, tag)) is not None
            except ProxyError as error:
                self._record_missing(subject, tag, str(error))
                return False

        tags = cosign_tags(subject)
        answers = await asyncio.gather(*map(exists, tags))
        return [tag for tag, does_exist in zip(tags, answers, strict=True) if does_exist]

    def _record_missing(self, subject: Digest, reference: Reference | str, reason: str) -> None:
        self.found.missing.append(MissingReferrer(subject, str(reference), reason))


async def _try_briefly(work: Callable[[], Awaitable[T]]) -> T:
    """Return the result of `work`, tried a few times if upstream limits requests or is down."""
    for _ in range(REFERRER_ATTEMPTS - 1):
        try:
            return await work()
        except (RateLimitedError, UpstreamDownError) as error:
            if error.retry_after > MAX_REFERRER_PAUSE:
                raise
            await asyncio.sleep(error.retry_after)
    return await work()
