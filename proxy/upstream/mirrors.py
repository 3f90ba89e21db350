"""Whom to ask for an upstream's content: its mirrors in their order, then the registry itself.

A mirror may help and never harm: whatever goes wrong with it, the next is asked, and what is told
at the end is the registry's own answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from proxy.errors import NotFoundError, OfflineError, ProxyError, UpstreamDownError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.upstream.registry_client import RegistryClient

# How long, in seconds, and of how many digests it is remembered that a mirror failed with them.
SUSPECT_TTL = 600.0
MAX_SUSPECT_BLOBS = 1000

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _SuspectBlob:
    expires_at: float
    is_corrupt: bool


class MirrorSet:
    """The ways to one upstream's content."""

    def __init__(
        self, registry: RegistryClient, mirrors: Sequence[RegistryClient], metrics: Metrics
    ) -> None:
        self.registry = registry
        self._mirrors = tuple(mirrors)
        self._metrics = metrics
        self._suspect_blobs: dict[Digest, _SuspectBlob] = {}
        self._now = asyncio.get_running_loop().time

    @property
    def is_up(self) -> bool:
        """Whether anybody is asked: not all are left alone because they fail."""
        return any(route.health.is_up for route in (self.registry, *self._mirrors))

    async def try_each(
        self, operation: Callable[[RegistryClient], Awaitable[T]], digest: Digest | None = None
    ) -> T:
        """Return what `work` makes of the first route that does not fail.

        If all do, raises what it raised for the registry. `digest` is that of the blob that is wanted.
        """
        failure: ProxyError | None = None
        for route in self._candidates(digest):
            if route is not self.registry:
                try:
                    with route.health.admit_and_record():
                        return await operation(route)
                except OfflineError:
                    raise
                except ProxyError as error:
                    self._record_failure(route, error)
                continue
            try:
                return await operation(route)
            except ProxyError as error:
                failure = error
        assert failure is not None
        raise failure

    def mark_suspect(self, digest: Digest, *, is_corrupt: bool) -> None:
        """Note that a mirror broke off a blob, or that what came of mirrors has another digest.

        For a while the registry is asked for it first, or, if bytes were wrong, the registry alone.
        """
        if not self._mirrors:
            return
        if len(self._suspect_blobs) >= MAX_SUSPECT_BLOBS:
            self._suspect_blobs.clear()
        self._suspect_blobs[digest] = _SuspectBlob(self._now() + SUSPECT_TTL, is_corrupt)

    def _candidates(self, digest: Digest | None) -> tuple[RegistryClient, ...]:
        doubt = self._suspect_blobs.get(digest) if digest else None
        if doubt is None or doubt.expires_at <= self._now():
            return (*self._mirrors, self.registry)
        return (self.registry,) if doubt.is_corrupt else (self.registry, *self._mirrors)

    def _record_failure(self, mirror: RegistryClient, error: ProxyError) -> None:
        if isinstance(error, UpstreamDownError):
            return  # it was not asked
        self._metrics.count_upstream_retry(mirror.name, "mirror")
        if not isinstance(error, NotFoundError):
            log.info("mirror_failed", upstream=mirror.label, reason=str(error))
