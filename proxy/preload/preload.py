"""Preloads: resolve images, fetch their missing content, verify and pin them.

All images are resolved before the first layer is fetched, so that the plan is known and an image
that does not fit fails early. An image whose upstream is unavailable at first is resolved and
fetched later, beside the others. Content that a preload needs is not evicted while it runs. A
preload stops when its client disconnects: complete content stays, and partial downloads that only
the preload requested are kept for resuming.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from proxy.cache.blobs import BlobCache
from proxy.cache.listings import ListingCache
from proxy.cache.manifests import ManifestCache
from proxy.concurrency import background
from proxy.config import FetchSettings
from proxy.download.manager import DownloadManager
from proxy.errors import (
    InvalidManifestError,
    NoSpaceError,
    PolicyDeniedError,
    ProxyError,
    UnknownBlobError,
)
from proxy.images.check import OfflineChecker
from proxy.images.selection import ImageSelection
from proxy.images.store import ImageStore
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.platform import Platform
from proxy.parsing import DocumentParser
from proxy.preload import events
from proxy.preload.backoff import UpstreamRetrier, is_transient
from proxy.preload.events import PreloadEvent
from proxy.preload.fetcher import PreloadFetcher
from proxy.preload.referrers import ReferrerResolver
from proxy.preload.report import PreloadReport
from proxy.preload.request import RequestedImage, merge_selections
from proxy.preload.resolve import FetchManifest, ImageResolver
from proxy.preload.resolved import MissingReferrer, ResolvedImage
from proxy.preload.space_budget import SpaceBudget
from proxy.storage.space import Lease
from proxy.traffic import purpose
from proxy.upstream.client import Upstream

# Seconds between two progress reports of running downloads.
PROGRESS_INTERVAL = 0.2
# Images of one upstream in parallel after a wait for it: few, to not exhaust its limit again.
DEFERRED_CONCURRENCY = 4

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PreloadDeps:
    """The parts of the program that preloads use.

    `native_platform` is fetched where no platform is requested; `fetch_settings.max_downloads`
    bounds `jobs`.
    """

    manifests: ManifestCache
    blobs: BlobCache
    downloads: DownloadManager
    resolver: ImageResolver
    listings: ListingCache
    checker: OfflineChecker
    image_store: ImageStore
    upstreams: Mapping[str, Upstream]
    metrics: Metrics
    parser: DocumentParser
    native_platform: Platform
    fetch_settings: FetchSettings
    clock: Callable[[], float]


class Preloader:
    """Preloads images; several preloads may run at once."""

    def __init__(self, deps: PreloadDeps) -> None:
        self._deps = deps

    @property
    def names(self) -> NameParser:
        """Parses the names of images."""
        return self._deps.image_store.names

    async def preload(
        self,
        selections: Iterable[ImageSelection],
        *,
        pin: bool = False,
        dry_run: bool = False,
        jobs: int | None = None,
        waits: bool = True,
    ) -> AsyncGenerator[PreloadEvent, None]:
        """Fetch images, up to `jobs` layers at once, and yield events; `PreloadTotals` last.

        An error fails only the image that it concerns. `pin` pins the images that are complete at
        the end; a `dry_run` fetches manifests only. Unless it `waits`, an upstream that is down or limits
        requests fails its images at once.
        """
        max_downloads = self._deps.fetch_settings.max_downloads
        concurrency = min(jobs or max_downloads, max_downloads)
        with self._deps.image_store.space.lease() as lease:
            run = _PreloadRun(
                self._deps, lease, pin=pin, dry_run=dry_run, concurrency=concurrency, waits=waits
            )
            async with background(run.run(selections)) as running:
                while not running.done():
                    await asyncio.wait((running,), timeout=PROGRESS_INTERVAL)
                    for event in run.take_events():
                        yield event
                await running
        totals = run.totals()
        log.info(
            "preload_finished", images=totals.images, failed=totals.failed, bytes=totals.fetched
        )
        yield totals


class _PreloadRun:
    """One preload."""

    def __init__(
        self,
        deps: PreloadDeps,
        lease: Lease,
        *,
        pin: bool,
        dry_run: bool,
        concurrency: int,
        waits: bool,
    ) -> None:
        self._deps = deps
        self._pin = pin
        self._dry_run = dry_run
        self._concurrency = concurrency
        self._report = PreloadReport(deps.metrics, dry_run=dry_run)
        self._budget = SpaceBudget(deps.image_store, lease)
        self._fetcher = PreloadFetcher(
            deps.manifests,
            deps.blobs,
            deps.downloads,
            deps.image_store,
            deps.parser,
            deps.upstreams,
            deps.fetch_settings,
            lease,
            UpstreamRetrier(deps.clock, self._report.add, waits=waits),
            self._report.add,
            concurrency=concurrency,
        )
        self._referrers = ReferrerResolver(deps.listings, deps.upstreams, self._fetcher)

    def take_events(self) -> list[PreloadEvent]:
        """Return the events since the last call, with the progress of the running downloads."""
        self._fetcher.report_progress()
        return self._report.take_events()

    def totals(self) -> events.PreloadTotals:
        """Return the totals."""
        return self._report.totals(self._fetcher.fetched_bytes)

    async def run(self, selections: Iterable[ImageSelection]) -> None:
        """Preload the selected images, and report every event and result. Runs in a task of its own."""
        purpose.set("preload")
        names = self._deps.image_store.names
        requested = merge_selections(selections, names, self._report.add_failed)
        resolved, deferred = await self._resolve_all(requested)
        self._report_plan(resolved)
        admitted = [image for image in resolved if self._admit_or_fail(image)]
        async with asyncio.TaskGroup() as group:
            for images in deferred.values():
                group.create_task(
                    _run_concurrently(images, self._preload_deferred, DEFERRED_CONCURRENCY)
                )
            group.create_task(_run_concurrently(admitted, self._fetch, self._concurrency))

    # Resolving.

    async def _resolve_all(
        self, images: Sequence[RequestedImage]
    ) -> tuple[list[ResolvedImage], dict[str, list[RequestedImage]]]:
        """Return the images that could be resolved, in order, and by upstream those to retry."""
        resolved: dict[RequestedImage, ResolvedImage] = {}
        deferred: dict[str, list[RequestedImage]] = {}

        async def resolve(image: RequestedImage) -> None:
            self._report.add(events.ResolveStarted(image=image.name))
            try:
                resolved[image] = await self._resolve(image, self._fetcher.fetch_manifest)
            except ProxyError as error:
                if is_transient(error):
                    deferred.setdefault(image.repository.upstream, []).append(image)
                else:
                    self._report.add_failed(image.name, error)

        await _run_concurrently(images, resolve, self._concurrency)
        in_order = [resolved[image] for image in images if image in resolved]
        return in_order, deferred

    async def _preload_deferred(self, image: RequestedImage) -> None:
        """Resolve and fetch an image whose upstream was unavailable, as soon as it is available."""
        try:
            resolved = await self._resolve(image, self._fetcher.fetch_manifest_when_available)
        except ProxyError as error:
            self._report.add_failed(image.name, error)
            return
        if self._admit_or_fail(resolved):
            await self._fetch(resolved)

    async def _resolve(self, image: RequestedImage, fetch_manifest: FetchManifest) -> ResolvedImage:
        stored_digest = self._fetcher.stored_digest(image.repository, image.reference)
        try:
            resolved = await self._resolve_content(image, fetch_manifest)
        except PolicyDeniedError as error:
            ripening = self._fetcher.find_ripening(image.repository, image.reference)
            if error.ripe_at is None or ripening is None:
                raise
            resolved = await self._resolve_ripening(image, ripening[0], str(error))
            resolved.refusal = error
        else:
            ripening = self._fetcher.find_ripening(image.repository, image.reference)
            if ripening:
                resolved.ripening = await self._resolve_ripening(image, *ripening)
        resolved.is_changed = resolved.digest != stored_digest
        self._report_resolved(resolved)
        return resolved

    async def _resolve_content(
        self, image: RequestedImage, fetch_manifest: FetchManifest
    ) -> ResolvedImage:
        platforms = image.platforms_to_fetch(self._deps.native_platform)
        resolved = await self._deps.resolver.resolve(image, platforms, fetch_manifest)
        resolved.referrers = await self._referrers.resolve(resolved)
        return resolved

    async def _resolve_ripening(
        self, image: RequestedImage, digest: Digest, reason: str
    ) -> ResolvedImage:
        """Return content that clients get once it is old enough, so that it is here by then."""
        event = events.ImageRipening(image=image.name, digest=str(digest), reason=reason)
        self._report.add(event)
        later = RequestedImage(image.repository, digest, image.platforms)
        return await self._resolve_content(later, self._fetcher.fetch_unjudged_manifest)

    def _report_resolved(self, image: ResolvedImage) -> None:
        layers = [
            events.ResolvedLayer(str(digest), size, self._deps.image_store.has_blob(digest, size))
            for digest, size in image.all_blobs().items()
        ]
        self._report.add(
            events.ResolveFinished(
                image=image.name,
                name=image.full_name,
                digest=str(image.digest),
                platforms=image.platforms,
                layers=layers,
                size=image.size,
                missing=sum(layer.size for layer in layers if not layer.exists),
                referrers=len(image.referrers.manifests),
            )
        )
        for missing in image.referrers.missing:
            self._report_missing_referrer(image, missing)

    def _report_missing_referrer(self, image: ResolvedImage, missing: MissingReferrer) -> None:
        self._report.add_missing_referrer(
            events.ReferrerMissing(
                image=image.name,
                subject=str(missing.subject),
                reference=missing.reference,
                reason=missing.reason,
            )
        )

    # Planning.

    def _report_plan(self, images: Sequence[ResolvedImage]) -> None:
        content = {digest: size for image in images for digest, size in image.all_content().items()}
        self._report.add(
            events.PreloadPlan(
                images=len(images),
                size=sum(content.values()),
                missing=sum(self._missing(content).values()),
                shortfall=self._budget.shortfall(images),
            )
        )

    def _admit_or_fail(self, image: ResolvedImage) -> bool:
        """Tell whether the image fits into the store; if it does not, report its failure."""
        if self._dry_run:
            return True
        try:
            self._budget.admit(image)
        except NoSpaceError as error:
            self._report.add_failed(image.name, error)
            return False
        return True

    # Fetching.

    async def _fetch(self, image: ResolvedImage) -> None:
        """Fetch the missing content of an image, verify it, pin it, and report the outcome."""
        is_fetched = image.is_changed or bool(self._missing(image.all_blobs()))
        try:
            fetched_bytes = await self._fetch_content(image)
            if image.refusal:
                raise image.refusal
            if image.ripening:
                fetched_bytes += await self._fetch_content(image.ripening)
            if self._pin and not self._dry_run:
                await self._deps.image_store.index.pin([(image.repository, image.reference)])
        except ProxyError as error:
            self._report.add_failed(image.name, error)
            return
        outcome: events.ImageOutcome = "up_to_date"
        if is_fetched:
            outcome = "would_fetch" if self._dry_run else "fetched"
        self._report.add_done(
            events.ImageDone(
                image=image.name,
                digest=str(image.digest),
                outcome=outcome,
                size=image.size,
                fetched=fetched_bytes,
            )
        )

    async def _fetch_content(self, image: ResolvedImage) -> int:
        """Fetch and verify an image with its referrers; return how many bytes came from upstream."""
        fetched_bytes = 0 if self._dry_run else await self._fetch_blobs(image)
        if image.missing_platforms_error:
            raise InvalidManifestError(image.missing_platforms_error)
        if not self._dry_run:
            await self._fetch_referrer_blobs(image)
            await self._verify(image.requested)
            records = image.referrers.records
            await self._deps.image_store.index.set_referrer_records(image.repository, records)
        return fetched_bytes

    async def _fetch_blobs(self, image: ResolvedImage) -> int:
        """Fetch the blobs of an image, and return how many bytes came from upstream.

        If some fail, the others are still fetched.
        """
        outcomes = await asyncio.gather(
            *(self._fetcher.fetch_blob(image.repository, *blob) for blob in image.blobs.items()),
            return_exceptions=True,
        )
        fetched_bytes = 0
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            fetched_bytes += outcome
        return fetched_bytes

    async def _fetch_referrer_blobs(self, image: ResolvedImage) -> None:
        """Fetch the blobs of an image's referrers, and report those that are missing."""
        fetch_blob, referrers = self._fetcher.fetch_blob, image.referrers

        async def fetch(digest: Digest, size: int) -> None:
            try:
                await fetch_blob(image.repository, digest, size, is_patient=False)
            except UnknownBlobError as error:
                log.info("referrer_gone", referrer=str(digest), reason=str(error))
            except ProxyError as error:
                missing = MissingReferrer(*referrers.origins[digest], str(error))
                self._report_missing_referrer(image, missing)

        blobs = [blob for blob in referrers.blobs.items() if blob[0] not in image.blobs]
        await asyncio.gather(*(fetch(*blob) for blob in blobs))

    async def _verify(self, image: RequestedImage) -> None:
        """Raise `InvalidManifestError` unless clients can pull the image without upstream."""
        selection = image.selection(self._deps.native_platform)
        async with aclosing(self._deps.checker.check([selection])) as checks:
            async for check in checks:
                if check.state != "complete":
                    raise InvalidManifestError(check.reason)

    def _missing(self, content: Mapping[Digest, int]) -> dict[Digest, int]:
        """Return the part of some content, given with its sizes, that the store lacks."""
        has_blob = self._deps.image_store.has_blob
        return {digest: size for digest, size in content.items() if not has_blob(digest, size)}


async def _run_concurrently(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int
) -> None:
    """Run `work` on each of the items, started in order, up to `concurrency` at once."""
    remaining = iter(items)

    async def work_through() -> None:
        for item in remaining:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work_through())
