"""Access to stored content: which digests the cache serves under which repository.

Knowing a digest is not enough, because the content may come from a private repository. A digest is
served under a repository if the index links the two, or if upstream, asked about that repository,
confirms that it has the digest. The index links a repository to the content that upstream has sent
for it, to the digests that manifests in that content name, and to the digests upstream has
confirmed.
"""

import asyncio
from collections.abc import Mapping

from proxy.concurrency import SingleFlight, enforce_deadline
from proxy.errors import StorageError, UnknownBlobError
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.index import BlobRow, Index
from proxy.upstream.client import Upstream

log = get_logger(__name__)


class RepositoryAccess:
    """Decides which stored or arriving content may be served under a repository.

    Methods that may ask upstream take a `deadline` of the event loop's clock. They raise
    `NotFoundError` if upstream does not have the digest in that repository, and `UpstreamError` if
    upstream cannot be asked.
    """

    def __init__(
        self, *, upstreams: Mapping[str, Upstream], index: Index, group: asyncio.TaskGroup
    ) -> None:
        self._upstreams = upstreams
        self._index = index
        self._checks: SingleFlight[tuple[Repository, Digest], None] = SingleFlight(group)

    def is_linked(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether the repository is known to hold the digest, stored or not."""
        return self._index.is_linked(repository, digest)

    def get_linked(self, repository: Repository, digest: Digest) -> BlobRow | None:
        """Return a stored blob that the repository is known to hold, without asking upstream."""
        row = self._index.blob(repository, digest)
        return row if row and row.is_linked else None

    async def get_blob(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> BlobRow | None:
        """Return a stored blob that the repository may serve; None if it is not stored."""
        row = self._index.blob(repository, digest)
        if row and not row.is_linked:
            await self._ask_upstream(repository, digest, deadline, is_manifest=False)
        return row

    async def get_manifest(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> BlobRow | None:
        """Return a stored manifest that the repository may serve; None if it is not stored."""
        row = self._index.blob(repository, digest)
        if row is None or row.media_type is None:
            return None
        if not row.is_linked:
            await self._ask_upstream(repository, digest, deadline, is_manifest=True)
        return row

    async def check_download(self, repository: Repository, digest: Digest, deadline: float) -> None:
        """Check that a download started for another repository may be served under this one."""
        if not self.is_linked(repository, digest):
            await self._ask_upstream(repository, digest, deadline, is_manifest=False)

    async def link(self, repository: Repository, digest: Digest) -> None:
        """Record that upstream has the digest in the repository.

        If the index cannot be written, the next request asks upstream again.
        """
        if self.is_linked(repository, digest):
            return
        try:
            await self._index.link(repository, digest)
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    async def _ask_upstream(
        self, repository: Repository, digest: Digest, deadline: float, *, is_manifest: bool
    ) -> None:
        """Ask upstream with one HEAD, shared by concurrent requests, whether it has the digest."""

        async def ask() -> None:
            upstream = self._upstreams[repository.upstream]
            if is_manifest:
                await upstream.resolve(repository.name, digest)
            elif not await upstream.has_blob(repository.name, digest):
                raise UnknownBlobError(f"{upstream.name} does not have it in {repository.name}")
            await self.link(repository, digest)

        async with enforce_deadline(deadline, repository.upstream):
            await self._checks.run((repository, digest), ask)
