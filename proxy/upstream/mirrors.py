"""An upstream's mirrors, tried in order before the registry itself.

A mirror must never make a request fail: if it fails in any way, the next one is asked, and the
client gets the registry's error.
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

# How long, in seconds, and for how many blobs failures of mirrors are remembered.
SUSPECT_TTL = 600.0
MAX_SUSPECT_BLOBS = 1000

T = TypeVar("T")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _SuspectBlob:
    expires_at: float
    is_corrupt: bool


class MirrorSet:
    """The registry of one upstream and its mirrors."""

    def __init__(
        self, registry: RegistryClient, mirrors: Sequence[RegistryClient], metrics: Metrics
    ) -> None:
        self.registry = registry
        self._mirrors = tuple(mirrors)
        self._metrics = metrics
        self._suspect_blobs: dict[Digest, _SuspectBlob] = {}
        self._now = asyncio.get_running_loop().time

    @property
    def has_mirrors(self) -> bool:
        """Whether there is any mirror."""
        return bool(self._mirrors)

    @property
    def is_up(self) -> bool:
        """Whether the registry or at least one mirror is up."""
        return any(client.health.is_up for client in self.clients)

    @property
    def clients(self) -> tuple[RegistryClient, ...]:
        """The registry, then the mirrors in the order in which they are asked."""
        return (self.registry, *self._mirrors)

    async def try_each(
        self, operation: Callable[[RegistryClient], Awaitable[T]], digest: Digest | None = None
    ) -> T:
        """Run `operation` with each client in turn; return the result of the first that succeeds.

        If all fail, raises the registry's error. `digest` is given if the operation is about a
        blob: see `mark_suspect`.
        """
        registry_error: ProxyError | None = None
        for client in self._candidates(digest):
            if client is self.registry:
                try:
                    return await operation(client)
                except ProxyError as error:
                    registry_error = error
            else:
                try:
                    with client.health.admit_and_record():
                        return await operation(client)
                except OfflineError:
                    raise
                except ProxyError as error:
                    self._record_mirror_failure(client, error)
        assert registry_error is not None
        raise registry_error

    def mark_suspect(self, digest: Digest, *, is_corrupt: bool) -> None:
        """Record that a mirror broke off a blob or, with `is_corrupt`, that the digest was wrong.

        For `SUSPECT_TTL` seconds the registry is then asked for the blob first, or, if it was
        corrupt, the registry only.
        """
        if not self._mirrors:
            return
        if len(self._suspect_blobs) >= MAX_SUSPECT_BLOBS:
            self._suspect_blobs.clear()
        self._suspect_blobs[digest] = _SuspectBlob(self._now() + SUSPECT_TTL, is_corrupt)

    def _candidates(self, digest: Digest | None) -> tuple[RegistryClient, ...]:
        suspect = self._suspect_blobs.get(digest) if digest else None
        if suspect is None or suspect.expires_at <= self._now():
            return (*self._mirrors, self.registry)
        return (self.registry,) if suspect.is_corrupt else (self.registry, *self._mirrors)

    def _record_mirror_failure(self, mirror: RegistryClient, error: ProxyError) -> None:
        if isinstance(error, UpstreamDownError):
            return  # its breaker is open: no request was sent
        self._metrics.count_upstream_retry(mirror.name, "mirror")
        if not isinstance(error, NotFoundError):
            log.info("mirror_failed", upstream=mirror.label, reason=str(error))
