"""Images fetched before anybody asks for them: resolved afresh, downloaded as for clients, looked over at the end.

First all images are resolved, so that it is known what there is to do, and what does not fit fails before anything
is fetched. Those that have to wait for an upstream are resolved while the others are fetched. What a preload has
brought, or found, is not evicted while it lasts. It ends with who listens to it; what is complete stays, and the
downloads that only it has begun are kept to be resumed.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from proxy.cache.pull_through import PullThroughCache
from proxy.concurrency import background
from proxy.download.manager import DownloadManager
from proxy.errors import (
    InvalidManifestError,
    NoSpaceError,
    ProxyError,
    RateLimitedError,
    error_code,
)
from proxy.images.check import ALL_PLATFORMS, ImageSelection, OfflineChecker
from proxy.images.tree import ImageStore
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.metrics import Metrics
from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.oci.platform import Platform, parse_platform
from proxy.oci.reference import Reference, Repository, Tag
from proxy.preload import events
from proxy.preload.backoff import UpstreamRetrier, is_transient
from proxy.preload.events import PreloadEvent
from proxy.preload.fetcher import PreloadFetcher
from proxy.preload.resolve import FetchManifest, ImageResolver, ResolvedImage
from proxy.preload.space_budget import SpaceBudget
from proxy.storage.space import Lease
from proxy.upstream.client import Upstream

# How often it is told how far layers are, in seconds.
PROGRESS_INTERVAL = 0.2
# Nobody says when there are more pulls again: after so many seconds upstream is asked (regsync's figure).
QUOTA_RETRY_AFTER = 900.0
# So many images of an upstream at once after a wait for it: fewer than would use up its limits again.
DEFERRED_CONCURRENCY = 4

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreloadDeps:
    """What preloads work with. `native` is the platform of who names none."""

    cache: PullThroughCache
    downloads: DownloadManager
    resolver: ImageResolver
    checker: OfflineChecker
    image_store: ImageStore
    upstreams: Mapping[str, Upstream]
    metrics: Metrics
    native_platform: Platform
    max_downloads: int
    clock: Callable[[], float]


class Preloader:
    """Preloads images; several preloads may run at once."""

    def __init__(self, deps: PreloadDeps) -> None:
        self._deps = deps

    async def preload(
        self,
        selections: Iterable[ImageSelection],
        *,
        pin: bool = False,
        dry_run: bool = False,
        jobs: int | None = None,
    ) -> AsyncGenerator[PreloadEvent, None]:
        """Fetch images, `jobs` layers at once, and yield what happens; at last `Totals`.

        What goes wrong with an image fails that image alone. With `pin` the images that are complete are
        pinned; a `dry_run` fetches manifests and nothing else.
        """
        at_once = min(jobs or self._deps.max_downloads, self._deps.max_downloads)
        with self._deps.image_store.space.lease() as hold:
            run = _PreloadRun(self._deps, hold, pin=pin, dry_run=dry_run, concurrency=at_once)
            async with background(run.run(selections)) as working:
                while not working.done():
                    await asyncio.wait((working,), timeout=PROGRESS_INTERVAL)
                    for event in run.drain_events():
                        yield event
                await working
                yield run.summarize()


@dataclass(slots=True)
class _PreloadImage:
    """An image that was asked for, by whatever names; of `platforms`, "" is the daemon's own."""

    repository: Repository
    reference: Reference
    platforms: dict[str, None]

    @property
    def name(self) -> str:
        return display_name(self.repository, self.reference)

    def to_selection(self, native_platform: Platform) -> ImageSelection:
        """Return what was asked for. Who names no platform takes an image for one platform as it is."""
        platforms = [
            text or str(native_platform)
            for text in self.platforms
            if text or len(self.platforms) > 1
        ]
        return ImageSelection(self.name, tuple(platforms))


class _PreloadRun:
    """One preload."""

    def __init__(
        self, deps: PreloadDeps, lease: Lease, *, pin: bool, dry_run: bool, concurrency: int
    ) -> None:
        self._deps = deps
        self._pin = pin
        self._dry_run = dry_run
        self._concurrency = concurrency
        self._events: list[PreloadEvent] = []
        self._results: list[events.ImageDone | events.ImageFailed] = []
        self._retrier = UpstreamRetrier(deps.clock, self._add_event)
        self._fetcher = PreloadFetcher(
            deps.cache,
            deps.downloads,
            deps.image_store,
            self._retrier,
            self._add_event,
            concurrency=concurrency,
        )
        self._space_budget = SpaceBudget(deps.image_store, lease)

    # What is told.

    def drain_events(self) -> list[PreloadEvent]:
        """Return what has happened since the last time."""
        self._fetcher.report_active()
        told, self._events = self._events, []
        return told

    def summarize(self) -> events.PreloadTotals:
        """Return how it ended."""
        outcomes = [end.outcome for end in self._results if isinstance(end, events.ImageDone)]
        totals = events.PreloadTotals(
            images=len(self._results),
            fetched_images=outcomes.count("fetched"),
            up_to_date=outcomes.count("up_to_date"),
            failed=len(self._results) - len(outcomes),
            fetched=self._fetcher.fetched_bytes,
        )
        log.info(
            "preload_finished", images=totals.images, failed=totals.failed, bytes=totals.fetched
        )
        return totals

    def _add_event(self, event: PreloadEvent) -> None:
        self._events.append(event)

    def _add_result(self, event: events.ImageDone | events.ImageFailed) -> None:
        self._events.append(event)
        self._results.append(event)
        if not self._dry_run:
            self._deps.metrics.count_preloaded(has_failed=isinstance(event, events.ImageFailed))

    def _fail(self, image: str, error: ProxyError) -> None:
        self._add_result(events.ImageFailed(image=image, code=error_code(error), reason=str(error)))

    # What is done.

    async def run(self, selections: Iterable[ImageSelection]) -> None:
        """Do all of it."""
        images = self._merge_selections(selections)
        ready: list[tuple[_PreloadImage, ResolvedImage]] = []
        late: dict[str, list[_PreloadImage]] = {}

        async def resolve(image: _PreloadImage) -> None:
            self._events.append(events.ResolveStarted(image=image.name))
            try:
                ready.append((image, await self._resolve(image, self._fetch_manifest)))
            except ProxyError as error:
                if is_transient(error):
                    late.setdefault(image.repository.upstream, []).append(image)
                else:
                    self._fail(image.name, error)

        await self._run_concurrently(images, resolve)
        order = {id(image): number for number, image in enumerate(images)}
        ready.sort(key=lambda pair: order[id(pair[0])])
        admitted = self._plan_and_admit(ready)
        async with asyncio.TaskGroup() as group:
            for waiting in late.values():
                group.create_task(
                    self._run_concurrently(waiting, self._fetch_deferred, DEFERRED_CONCURRENCY)
                )
            group.create_task(self._run_concurrently(admitted, self._fetch_image))

    def _merge_selections(self, selections: Iterable[ImageSelection]) -> list[_PreloadImage]:
        """Return the images that are meant, each once and with all its platforms."""
        images: dict[tuple[Repository, Reference], _PreloadImage] = {}
        for one in selections:
            try:
                key = self._deps.image_store.names.parse_allowed(one.image)
                for text in one.platforms:
                    if text != ALL_PLATFORMS:
                        parse_platform(text)
            except ProxyError as error:
                self._fail(one.image[:200], error)
                continue
            image = images.setdefault(key, _PreloadImage(*key, {}))
            image.platforms.update(dict.fromkeys(one.platforms or ("",)))
        return list(images.values())

    async def _run_concurrently(
        self,
        items: Iterable[T],
        work: Callable[[T], Awaitable[None]],
        concurrency: int | None = None,
    ) -> None:
        """Do the work with each of the things, in their order, some at once."""
        left = iter(items)

        async def take() -> None:
            for thing in left:
                await work(thing)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency or self._concurrency):
                group.create_task(take())

    async def _fetch_deferred(self, image: _PreloadImage) -> None:
        """Resolve an image that upstream could not give at first, waiting for it, and fetch it."""

        async def pull(repository: Repository, reference: Reference) -> CachedManifest:
            work = partial(self._fetch_manifest, repository, reference)
            return await self._retrier.retry_while_unavailable(repository.upstream, work)

        try:
            found = await self._resolve(image, pull)
        except ProxyError as error:
            self._fail(image.name, error)
            return
        if self._dry_run or self._admit(image, found):
            await self._fetch_image((image, found))

    async def _resolve(self, image: _PreloadImage, fetch_manifest: FetchManifest) -> ResolvedImage:
        asked = image.to_selection(self._deps.native_platform).platforms or (
            str(self._deps.native_platform),
        )
        platforms = [] if ALL_PLATFORMS in asked else list(map(parse_platform, asked))
        before = self._stored_digest(image.repository, image.reference)
        resolver = self._deps.resolver
        found = await resolver.resolve(image.repository, image.reference, platforms, fetch_manifest)
        found.is_changed = found.digest != before
        mark = "@" if isinstance(found.reference, Digest) else ":"
        layers = [
            events.ResolvedLayer(str(digest), size, self._deps.image_store.has_blob(digest, size))
            for digest, size in found.blobs.items()
        ]
        self._events.append(
            events.ResolveFinished(
                image=image.name,
                name=f"{found.repository.upstream}/{found.repository.name}{mark}{found.reference}",
                digest=str(found.digest),
                platforms=found.platforms,
                layers=layers,
                size=found.size,
                missing=sum(layer.size for layer in layers if not layer.exists),
                referrers=len(found.referrers),
            )
        )
        return found

    async def _fetch_manifest(self, repository: Repository, reference: Reference) -> CachedManifest:
        """Return a manifest, and keep it here; leave the last pulls of a limit to clients."""
        upstream = self._deps.upstreams[repository.upstream]
        if upstream.scarce_quota_reason and not self._stored_digest(repository, reference):
            # This costs none, and tells how many there are now.
            await upstream.resolve(repository.name, reference)
            if upstream.scarce_quota_reason:
                raise RateLimitedError(
                    f"{upstream.scarce_quota_reason}, which are left to clients",
                    retry_after=QUOTA_RETRY_AFTER,
                )
        held = await self._deps.cache.get_current_manifest(repository, reference)
        self._space_budget.add_to_lease([held.digest])
        return held

    def _stored_digest(self, repository: Repository, reference: Reference) -> Digest | None:
        """Return the manifest that is here under this name."""
        index = self._deps.image_store.index
        known = index.tag(repository, reference) if isinstance(reference, Tag) else None
        digest = known.digest if known else reference
        return digest if isinstance(digest, Digest) and index.manifest(digest) else None

    def _plan_and_admit(
        self, resolved_images: Sequence[tuple[_PreloadImage, ResolvedImage]]
    ) -> list[tuple[_PreloadImage, ResolvedImage]]:
        """Say what there is to do, and return what fits."""
        images = [found for _, found in resolved_images]
        sizes = {digest: size for found in images for digest, size in found.all_content().items()}
        self._events.append(
            events.PreloadPlan(
                images=len(resolved_images),
                size=sum(sizes.values()),
                missing=sum(
                    size
                    for digest, size in sizes.items()
                    if not self._deps.image_store.has_blob(digest, size)
                ),
                lacking=self._space_budget.shortfall(images),
            )
        )
        return [pair for pair in resolved_images if self._dry_run or self._admit(*pair)]

    def _admit(self, image: _PreloadImage, resolved: ResolvedImage) -> bool:
        """Give the image its room; if there is none it has failed."""
        try:
            self._space_budget.admit(resolved)
        except NoSpaceError as error:
            self._fail(image.name, error)
            return False
        return True

    # Fetching.

    async def _fetch_image(self, admitted: tuple[_PreloadImage, ResolvedImage]) -> None:
        """Bring what is missing of an image, look it over, and pin it."""
        image, found = admitted
        missing = {
            d: size
            for d, size in found.blobs.items()
            if not self._deps.image_store.has_blob(d, size)
        }
        try:
            fetched = 0 if self._dry_run else await self._fetch_blobs(found)
            if found.missing_platforms_error:
                raise InvalidManifestError(found.missing_platforms_error)
            if not self._dry_run:
                await self._verify_offline(image)
            if self._pin and not self._dry_run:
                await self._deps.image_store.index.pin([(image.repository, image.reference)])
        except ProxyError as error:
            self._fail(image.name, error)
            return
        outcome: events.ImageOutcome = "fetched" if missing or found.is_changed else "up_to_date"
        if self._dry_run and outcome == "fetched":
            outcome = "would_fetch"
        self._add_result(
            events.ImageDone(
                image=image.name,
                digest=str(found.digest),
                outcome=outcome,
                size=found.size,
                fetched=fetched,
            )
        )

    async def _fetch_blobs(self, resolved: ResolvedImage) -> int:
        """Bring the blobs of an image, all that can be had; return how many bytes had to be fetched."""
        wanted = [*resolved.blobs.items(), *resolved.referrer_blobs.items()]
        outcomes = await asyncio.gather(
            *(self._fetch_blob(resolved.repository, *blob) for blob in wanted),
            return_exceptions=True,
        )
        fetched = 0
        for (digest, _), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, int):
                fetched += outcome
            elif not isinstance(outcome, ProxyError) or digest in resolved.blobs:
                raise outcome
            else:
                log.info("referrers_failed", image=resolved.name, reason=str(outcome))
        return fetched

    async def _fetch_blob(self, repository: Repository, digest: Digest, size: int) -> int:
        fetched = await self._fetcher.fetch_blob(repository, digest, size)
        self._space_budget.add_to_lease([digest])
        return fetched

    async def _verify_offline(self, image: _PreloadImage) -> None:
        """See that clients can pull it with the network unplugged, or raise `InvalidManifestError`."""
        wanted = [image.to_selection(self._deps.native_platform)]
        async with aclosing(self._deps.checker.check(wanted)) as checks:
            async for check in checks:
                if check.state != "complete":
                    raise InvalidManifestError(check.reason)
