"""Whom to ask for an upstream's content: its mirrors in their order, then the registry itself.

A mirror may help and never harm: whatever goes wrong with it, the next is asked, and what is told
at the end is the registry's own answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from proxy.errors import OfflineError, ProxyError, UnknownError, UpstreamDownError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.upstream.registry_client import Exchange

# How long, in seconds, and of how many digests it is remembered that a mirror failed with them.
DOUBT = 600.0
MAX_DOUBTS = 1000

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Doubt:
    until: float
    is_wrong: bool


class Routes:
    """The ways to one upstream's content."""

    def __init__(self, registry: Exchange, mirrors: Sequence[Exchange], metrics: Metrics) -> None:
        self.registry = registry
        self._mirrors = tuple(mirrors)
        self._metrics = metrics
        self._doubts: dict[Digest, _Doubt] = {}
        self._now = asyncio.get_running_loop().time

    @property
    def is_up(self) -> bool:
        """Whether anybody is asked: not all are left alone because they fail."""
        return any(route.health.is_up for route in (self.registry, *self._mirrors))

    async def first(
        self, work: Callable[[Exchange], Awaitable[T]], digest: Digest | None = None
    ) -> T:
        """Return what `work` makes of the first route that does not fail.

        If all do, raises what it raised for the registry. `digest` is that of the blob that is wanted.
        """
        failure: ProxyError | None = None
        for route in self._order(digest):
            if route is not self.registry:
                try:
                    with route.health.judged():
                        return await work(route)
                except OfflineError:
                    raise
                except ProxyError as error:
                    self._note(route, error)
                continue
            try:
                return await work(route)
            except ProxyError as error:
                failure = error
        assert failure is not None
        raise failure

    def doubt(self, digest: Digest, *, is_wrong: bool) -> None:
        """Note that a mirror broke off a blob, or that what came of mirrors has another digest.

        For a while the registry is asked for it first, or, if bytes were wrong, the registry alone.
        """
        if not self._mirrors:
            return
        if len(self._doubts) >= MAX_DOUBTS:
            self._doubts.clear()
        self._doubts[digest] = _Doubt(self._now() + DOUBT, is_wrong)

    def _order(self, digest: Digest | None) -> tuple[Exchange, ...]:
        doubt = self._doubts.get(digest) if digest else None
        if doubt is None or doubt.until <= self._now():
            return (*self._mirrors, self.registry)
        return (self.registry,) if doubt.is_wrong else (self.registry, *self._mirrors)

    def _note(self, mirror: Exchange, error: ProxyError) -> None:
        if isinstance(error, UpstreamDownError):
            return  # it was not asked
        self._metrics.upstream_retry(mirror.name, "mirror")
        if not isinstance(error, UnknownError):
            log.info("mirror_failed", upstream=mirror.peer, reason=str(error))
