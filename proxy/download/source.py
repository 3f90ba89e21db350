"""The source of a download's bytes: one blob in one repository of an upstream."""

from contextlib import AbstractAsyncContextManager

from proxy.download.rate_limit import RateLimiter
from proxy.errors import DigestMismatchError, ProxyError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.traffic import purpose
from proxy.upstream.body import BlobBody
from proxy.upstream.client import Upstream

_SKIP_SIZE = 64 << 10

log = get_logger(__name__)


class BlobSource:
    """One blob in one repository of an upstream, with metrics and logs for its transfers."""

    def __init__(
        self,
        upstream: Upstream,
        repository: Repository,
        digest: Digest,
        metrics: Metrics,
        limiter: RateLimiter,
    ) -> None:
        self.upstream_name = upstream.name
        self.repository = repository
        self.digest = digest
        self._upstream = upstream
        self._metrics = metrics
        self._limiter = limiter
        self._purpose = purpose.get()

    def open(self, start: int, stop: int | None = None) -> AbstractAsyncContextManager[BlobBody]:
        """Request the blob from `start` on, up to `stop` if upstream supports ranges.

        The context raises `UnknownBlobError` and `UpstreamError`.
        """
        return self._upstream.open_blob(self.repository.name, self.digest, start, stop)

    async def skip_to(self, body: BlobBody, offset: int) -> None:
        """Read and discard the bytes that an upstream without ranges sends before `offset`."""
        left = offset - body.offset
        scratch = memoryview(bytearray(min(left, _SKIP_SIZE))) if left > 0 else None
        while scratch and left > 0:
            count = await self.read_into(body, scratch[:left])
            if not count:
                return
            left -= count

    async def read_into(self, body: BlobBody, buffer: memoryview) -> int:
        """Read the next bytes into `buffer`; return their number, 0 at the end. Raises `UpstreamError`."""
        granted = await self._limiter.acquire(self, len(buffer))
        count = 0
        try:
            count = await body.read_into(buffer[:granted])
        finally:
            self._limiter.give_back(granted - count)
        self._metrics.count_upstream_bytes(
            self.upstream_name, "blob", count, self._purpose, self.repository.name
        )
        return count

    def record_retry(self, offset: int, error: ProxyError) -> None:
        """Count and log the retry of a transfer at `offset`."""
        self._metrics.count_upstream_retry(self.upstream_name, "transfer")
        log.info("download_retried", digest=str(self.digest), offset=offset, reason=str(error))

    def record_mismatch(self) -> DigestMismatchError:
        """Count a digest mismatch and return the error; later requests for the blob skip the mirrors."""
        self._metrics.count_digest_mismatch(self.upstream_name)
        self._upstream.mark_suspect(self.digest)
        return DigestMismatchError(f"{self.upstream_name} sent wrong content for {self.digest}")
