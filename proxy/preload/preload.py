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

from proxy.cache.pull_through import PullThrough
from proxy.concurrency import beside
from proxy.download.manager import Downloads
from proxy.errors import InvalidManifestError, NoSpaceError, ProxyError, RateLimitedError, code_of
from proxy.images.check import ALL, Checker, Wanted
from proxy.images.tree import Contents
from proxy.log import get_logger
from proxy.lru import Held
from proxy.metrics import Metrics
from proxy.names import spell
from proxy.oci.digest import Digest
from proxy.oci.manifest import Platform
from proxy.oci.platform import parse_platform
from proxy.oci.reference import Reference, Repository, Tag
from proxy.preload import events
from proxy.preload.allotment import Allotment
from proxy.preload.backoff import Waits, is_passing
from proxy.preload.bringing import Bringer
from proxy.preload.events import Event
from proxy.preload.resolve import Found, Pull, Resolver
from proxy.storage.space import Hold
from proxy.upstream.client import Upstream

# How often it is told how far layers are, in seconds.
INTERVAL = 0.2
# Nobody says when there are more pulls again: after so many seconds upstream is asked (regsync's figure).
SCARCE = 900.0
# So many images of an upstream at once after a wait for it: fewer than would use up its limits again.
CATCH_UP = 4

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tools:
    """What preloads work with. `native` is the platform of who names none."""

    cache: PullThrough
    downloads: Downloads
    resolver: Resolver
    checker: Checker
    contents: Contents
    upstreams: Mapping[str, Upstream]
    metrics: Metrics
    native: Platform
    max_downloads: int
    clock: Callable[[], float]


class Preloader:
    """Preloads images; several preloads may run at once."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def preload(
        self,
        wanted: Iterable[Wanted],
        *,
        pin: bool = False,
        dry_run: bool = False,
        jobs: int | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Fetch images, `jobs` layers at once, and yield what happens; at last `Totals`.

        What goes wrong with an image fails that image alone. With `pin` the images that are complete are
        pinned; a `dry_run` fetches manifests and nothing else.
        """
        at_once = min(jobs or self._tools.max_downloads, self._tools.max_downloads)
        with self._tools.contents.space.hold() as hold:
            run = _Run(self._tools, hold, pin=pin, dry_run=dry_run, at_once=at_once)
            async with beside(run.work(wanted)) as working:
                while not working.done():
                    await asyncio.wait((working,), timeout=INTERVAL)
                    for event in run.news():
                        yield event
                await working
                yield run.totals()


@dataclass(slots=True)
class _Image:
    """An image that was asked for, by whatever names; of `platforms`, "" is the daemon's own."""

    repository: Repository
    reference: Reference
    platforms: dict[str, None]

    @property
    def name(self) -> str:
        return spell(self.repository, self.reference)

    def wanted(self, native: Platform) -> Wanted:
        """Return what was asked for. Who names no platform takes an image for one platform as it is."""
        platforms = [
            text or str(native) for text in self.platforms if text or len(self.platforms) > 1
        ]
        return Wanted(self.name, tuple(platforms))


class _Run:
    """One preload."""

    def __init__(self, tools: Tools, hold: Hold, *, pin: bool, dry_run: bool, at_once: int) -> None:
        self._tools = tools
        self._pin = pin
        self._dry_run = dry_run
        self._at_once = at_once
        self._told: list[Event] = []
        self._ends: list[events.Done | events.Failed] = []
        self._waits = Waits(tools.clock, self._told_of)
        self._bringer = Bringer(
            tools.cache,
            tools.downloads,
            tools.contents,
            self._waits,
            self._told_of,
            at_once=at_once,
        )
        self._allotment = Allotment(tools.contents, hold)

    # What is told.

    def news(self) -> list[Event]:
        """Return what has happened since the last time."""
        self._bringer.show()
        told, self._told = self._told, []
        return told

    def totals(self) -> events.Totals:
        """Return how it ended."""
        outcomes = [end.outcome for end in self._ends if isinstance(end, events.Done)]
        totals = events.Totals(
            images=len(self._ends),
            fetched_images=outcomes.count("fetched"),
            up_to_date=outcomes.count("up_to_date"),
            failed=len(self._ends) - len(outcomes),
            fetched=self._bringer.fetched,
        )
        log.info("preloaded", images=totals.images, failed=totals.failed, bytes=totals.fetched)
        return totals

    def _told_of(self, event: Event) -> None:
        self._told.append(event)

    def _end(self, end: events.Done | events.Failed) -> None:
        self._told.append(end)
        self._ends.append(end)
        if not self._dry_run:
            self._tools.metrics.preloaded(is_failed=isinstance(end, events.Failed))

    def _fail(self, image: str, error: ProxyError) -> None:
        self._end(events.Failed(image=image, code=code_of(error), reason=str(error)))

    # What is done.

    async def work(self, wanted: Iterable[Wanted]) -> None:
        """Do all of it."""
        images = self._images(wanted)
        ready: list[tuple[_Image, Found]] = []
        late: dict[str, list[_Image]] = {}

        async def resolve(image: _Image) -> None:
            self._told.append(events.Resolving(image=image.name))
            try:
                ready.append((image, await self._resolve(image, self._pull)))
            except ProxyError as error:
                if is_passing(error):
                    late.setdefault(image.repository.upstream, []).append(image)
                else:
                    self._fail(image.name, error)

        await self._each(images, resolve)
        order = {id(image): number for number, image in enumerate(images)}
        ready.sort(key=lambda pair: order[id(pair[0])])
        admitted = self._plan(ready)
        async with asyncio.TaskGroup() as group:
            for waiting in late.values():
                group.create_task(self._each(waiting, self._catch_up, CATCH_UP))
            group.create_task(self._each(admitted, self._fetch))

    def _images(self, wanted: Iterable[Wanted]) -> list[_Image]:
        """Return the images that are meant, each once and with all its platforms."""
        images: dict[tuple[Repository, Reference], _Image] = {}
        for one in wanted:
            try:
                key = self._tools.contents.names.parse(one.image)
                for text in one.platforms:
                    if text != ALL:
                        parse_platform(text)
            except ProxyError as error:
                self._fail(one.image[:200], error)
                continue
            image = images.setdefault(key, _Image(*key, {}))
            image.platforms.update(dict.fromkeys(one.platforms or ("",)))
        return list(images.values())

    async def _each(
        self, things: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int | None = None
    ) -> None:
        """Do the work with each of the things, in their order, some at once."""
        left = iter(things)

        async def take() -> None:
            for thing in left:
                await work(thing)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once or self._at_once):
                group.create_task(take())

    async def _catch_up(self, image: _Image) -> None:
        """Resolve an image that upstream could not give at first, waiting for it, and fetch it."""

        async def pull(repository: Repository, reference: Reference) -> Held:
            work = partial(self._pull, repository, reference)
            return await self._waits.patiently(repository.upstream, work)

        try:
            found = await self._resolve(image, pull)
        except ProxyError as error:
            self._fail(image.name, error)
            return
        if self._dry_run or self._admit(image, found):
            await self._fetch((image, found))

    async def _resolve(self, image: _Image, pull: Pull) -> Found:
        asked = image.wanted(self._tools.native).platforms or (str(self._tools.native),)
        platforms = [] if ALL in asked else list(map(parse_platform, asked))
        before = self._known(image.repository, image.reference)
        resolver = self._tools.resolver
        found = await resolver.resolve(image.repository, image.reference, platforms, pull)
        found.is_new = found.digest != before
        mark = "@" if isinstance(found.reference, Digest) else ":"
        layers = [
            events.Layer(str(digest), size, self._tools.contents.has(digest, size))
            for digest, size in found.blobs.items()
        ]
        self._told.append(
            events.Resolved(
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

    async def _pull(self, repository: Repository, reference: Reference) -> Held:
        """Return a manifest, and keep it here; leave the last pulls of a limit to clients."""
        upstream = self._tools.upstreams[repository.upstream]
        if upstream.scarcity and not self._known(repository, reference):
            # This costs none, and tells how many there are now.
            await upstream.resolve(repository.name, reference)
            if upstream.scarcity:
                raise RateLimitedError(
                    f"{upstream.scarcity}, which are left to clients", retry_after=SCARCE
                )
        held = await self._tools.cache.current(repository, reference)
        self._allotment.keep([held.digest])
        return held

    def _known(self, repository: Repository, reference: Reference) -> Digest | None:
        """Return the manifest that is here under this name."""
        index = self._tools.contents.index
        known = index.tag(repository, reference) if isinstance(reference, Tag) else None
        digest = known.digest if known else reference
        return digest if isinstance(digest, Digest) and index.manifest(digest) else None

    def _plan(self, ready: Sequence[tuple[_Image, Found]]) -> list[tuple[_Image, Found]]:
        """Say what there is to do, and return what fits."""
        images = [found for _, found in ready]
        sizes = {digest: size for found in images for digest, size in found.contents().items()}
        self._told.append(
            events.Plan(
                images=len(ready),
                size=sum(sizes.values()),
                missing=sum(
                    size
                    for digest, size in sizes.items()
                    if not self._tools.contents.has(digest, size)
                ),
                lacking=self._allotment.lacking(images),
            )
        )
        return [pair for pair in ready if self._dry_run or self._admit(*pair)]

    def _admit(self, image: _Image, found: Found) -> bool:
        """Give the image its room; if there is none it has failed."""
        try:
            self._allotment.admit(found)
        except NoSpaceError as error:
            self._fail(image.name, error)
            return False
        return True

    # Fetching.

    async def _fetch(self, planned: tuple[_Image, Found]) -> None:
        """Bring what is missing of an image, look it over, and pin it."""
        image, found = planned
        missing = {
            d: size for d, size in found.blobs.items() if not self._tools.contents.has(d, size)
        }
        try:
            fetched = 0 if self._dry_run else await self._fetch_blobs(found)
            if found.lacking:
                raise InvalidManifestError(found.lacking)
            if not self._dry_run:
                await self._look_over(image)
            if self._pin and not self._dry_run:
                await self._tools.contents.index.pin([(image.repository, image.reference)])
        except ProxyError as error:
            self._fail(image.name, error)
            return
        outcome: events.Outcome = "fetched" if missing or found.is_new else "up_to_date"
        if self._dry_run and outcome == "fetched":
            outcome = "would_fetch"
        self._end(
            events.Done(
                image=image.name,
                digest=str(found.digest),
                outcome=outcome,
                size=found.size,
                fetched=fetched,
            )
        )

    async def _fetch_blobs(self, found: Found) -> int:
        """Bring the blobs of an image, all that can be had; return how many bytes had to be fetched."""
        wanted = [*found.blobs.items(), *found.extras.items()]
        outcomes = await asyncio.gather(
            *(self._bring(found.repository, *blob) for blob in wanted), return_exceptions=True
        )
        fetched = 0
        for (digest, _), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, int):
                fetched += outcome
            elif not isinstance(outcome, ProxyError) or digest in found.blobs:
                raise outcome
            else:
                log.info("referrers_failed", image=found.name, reason=str(outcome))
        return fetched

    async def _bring(self, repository: Repository, digest: Digest, size: int) -> int:
        fetched = await self._bringer.bring(repository, digest, size)
        self._allotment.keep([digest])
        return fetched

    async def _look_over(self, image: _Image) -> None:
        """See that clients can pull it with the network unplugged, or raise `InvalidManifestError`."""
        wanted = [image.wanted(self._tools.native)]
        async with aclosing(self._tools.checker.check(wanted)) as checks:
            async for check in checks:
                if check.state != "complete":
                    raise InvalidManifestError(check.reason)
