"""Where a download's bytes come from: one blob under one repository of an upstream."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from proxy.errors import DigestMismatchError, ProxyError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.upstream.body import BlobBody
from proxy.upstream.client import Upstream

log = get_logger(__name__)


class BlobSource:
    """One blob under one repository of an upstream."""

    def __init__(
        self, upstream: Upstream, repository: str, digest: Digest, metrics: Metrics
    ) -> None:
        self.upstream_name = upstream.name
        self.digest = digest
        self._upstream = upstream
        self._repository = repository
        self._metrics = metrics

    def open(self, start: int, stop: int | None = None) -> AbstractAsyncContextManager[BlobBody]:
        """Open the blob at `start`, for the bytes before `stop` if upstream does ranges."""
        return self._upstream.open_blob(self._repository, self.digest, start, stop)

    async def iter_chunks(self, body: BlobBody, offset: int) -> AsyncIterator[memoryview]:
        """Yield what arrives from `offset` on, also if upstream starts over at 0.

        What is yielded is overwritten after the next step.
        """
        surplus = offset - body.offset
        async for chunk in body.iter_chunks():
            self._metrics.count_upstream_bytes(self.upstream_name, "blob", len(chunk))
            if surplus < len(chunk):
                yield chunk[surplus:] if surplus else chunk
            surplus = max(0, surplus - len(chunk))

    def record_retry(self, offset: int, error: ProxyError) -> None:
        """Count and log that a transfer is tried again."""
        self._metrics.count_upstream_retry(self.upstream_name, "transfer")
        log.info("download_retried", digest=str(self.digest), offset=offset, reason=str(error))

    def record_mismatch(self) -> DigestMismatchError:
        """Return, and count, that upstream sent something else."""
        self._metrics.count_digest_mismatch(self.upstream_name)
        self._upstream.mark_suspect(self.digest)
        return DigestMismatchError(f"{self.upstream_name} sent other content for {self.digest}")
