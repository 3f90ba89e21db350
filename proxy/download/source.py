"""The source of a download's bytes: one blob in one repository of an upstream."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from proxy.download.peer_route import PeerRoute
from proxy.download.rate_limit import RateLimiter
from proxy.errors import DigestMismatchError, ProxyError
from proxy.log import get_logger
from proxy.metrics import DownloadSource, Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.traffic import purpose
from proxy.upstream.body import BlobBody
from proxy.upstream.client import Upstream
from proxy.upstream.peers import PeerBody, PeerClient, PeerError

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
        peers: PeerClient | None = None,
    ) -> None:
        self.upstream_name = upstream.name
        self.repository = repository
        self.digest = digest
        self._upstream = upstream
        self._metrics = metrics
        self._limiter = limiter
        self._purpose = purpose.get()
        self._route = PeerRoute(peers, upstream, repository, digest) if peers else None

    @asynccontextmanager
    async def open(
        self, start: int, stop: int | None = None, *, is_only_connection: bool = True
    ) -> AsyncIterator[BlobBody]:
        """Request the blob from `start` on, up to `stop` if upstream supports ranges.

        A peer of the fleet is asked first, unless other connections fetch the blob too. It sends all from
        `start` on. The context raises `UnknownBlobError` and `UpstreamError`.
        """
        async with AsyncExitStack() as stack:
            body: BlobBody | None = None
            if self._route and is_only_connection:
                body = await self._route.open(stack, start)
            if body is None:
                body = await stack.enter_async_context(
                    self._upstream.open_blob(self.repository.name, self.digest, start, stop)
                )
            yield body

    @property
    def path(self) -> tuple[str, ...]:
        """The nodes of the fleet that the bytes come through now; empty without a fleet."""
        return self._route.path if self._route else ()

    @property
    def origin(self) -> DownloadSource:
        """Whether a peer has sent bytes, or upstream all of them."""
        return "peer" if self._route and self._route.has_received else "upstream"

    async def leave_peer(self, error: ProxyError) -> bool:
        """Return whether a peer has failed, so that the next `open` takes another way at once."""
        if self._route and isinstance(error, PeerError):
            await self._route.leave(error)
            return True
        return False

    async def bar_peers(self) -> bool:
        """Bar the peers that have sent bytes, which are wrong; return whether there were any."""
        if self.origin == "upstream" or not self._route:
            return False
        await self._route.bar_senders()
        return True

    async def close(self, *, is_stored: bool) -> None:
        """Tell the fleet that the download has ended."""
        if self._route:
            await self._route.close(is_stored=is_stored)

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
        if isinstance(body, PeerBody):
            count = await body.read_into(buffer)
            self._metrics.count_peer_bytes("in", count)
            return count
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
        """Count and log the retry of a transfer at `offset`; by then a peer may have the blob."""
        if self._route:
            self._route.ask_again()
        self._metrics.count_upstream_retry(self.upstream_name, "transfer")
        log.info("download_retried", digest=str(self.digest), offset=offset, reason=str(error))

    def record_mismatch(self) -> DigestMismatchError:
        """Count a digest mismatch and return the error; later requests for the blob skip the mirrors."""
        if self.origin == "upstream":
            self._metrics.count_digest_mismatch(self.upstream_name)
            self._upstream.mark_suspect(self.digest)
        return DigestMismatchError(f"{self.upstream_name} sent wrong content for {self.digest}")
