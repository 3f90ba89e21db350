"""Access to content: under which repository the cache serves what it has.

Knowing a digest is not enough, because the content may be private. `decide` is the rule; docs/security.md
has the argument for it. A repository is linked to a stored digest if

- upstream has sent all its bytes under this repository, from the registry or a mirror, or
- upstream has sent them under another repository, and the registry has given a proof that it has the
  digest in this one, or
- an operator has imported it there.

A proof never links what only another upstream has sent: that registry may be hostile, and repeat whatever
digest and size it is asked for. What a manifest names is a claim of the manifest's author. It proves nothing.
"""

import asyncio
from collections.abc import Mapping
from enum import Enum, auto

from proxy.concurrency import RESPONSE_TIMEOUT, SingleFlight, enforce_deadline
from proxy.download.download import Download
from proxy.errors import (
    DigestMismatchError,
    NotFoundError,
    StorageError,
    UnsatisfiableRangeError,
    UpstreamError,
    UpstreamUnauthorizedError,
)
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.storage.index import BlobRow, Index
from proxy.upstream.client import Upstream
from proxy.upstream.responses import Evidence, is_proof

# Proofs that are asked for before a client needs them, at a time.
MAX_BACKGROUND_CHECKS = 32

log = get_logger(__name__)


class Decision(Enum):
    """What a request for a digest under a repository needs before the content is sent."""

    # Nothing: it is served.
    SERVE = auto()
    # A proof of the registry; without one, as below.
    PROVE = auto()
    # Upstream has to send it under this repository, as if the cache did not have it.
    FETCH = auto()


def decide(*, is_linked: bool, is_from_upstream: bool) -> Decision:
    """Decide whether content that is stored, or arriving, may be served under a repository.

    `is_linked`: the repository is linked to the stored content, or its own download brings it.
    `is_from_upstream`: the repository's upstream has sent the stored content, or sends the arriving
    content, under another repository.
    """
    if is_linked:
        return Decision.SERVE
    return Decision.PROVE if is_from_upstream else Decision.FETCH


class RepositoryAccess:
    """Applies the rule to stored and arriving content.

    Methods that may ask upstream take a `deadline` of the event loop's clock, and raise `UpstreamError`
    if upstream cannot be asked.
    """

    def __init__(
        self, *, upstreams: Mapping[str, Upstream], index: Index, group: asyncio.TaskGroup
    ) -> None:
        self._upstreams = upstreams
        self._index = index
        self._now = asyncio.get_running_loop().time
        self._probes: SingleFlight[tuple[Repository, Digest, bool], Evidence]
        self._probes = SingleFlight(group)
        self._checks: SingleFlight[tuple[Repository, Digest], BlobRow | None] = SingleFlight(group)

    def get_linked(self, repository: Repository, digest: Digest) -> BlobRow | None:
        """Return a stored blob that may be served without asking upstream."""
        row = self._index.blob(repository, digest)
        return row if row and row.is_linked else None

    async def get_blob(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> BlobRow | None:
        """Return a stored blob that may be served; None if upstream has to send it."""
        row = self._index.blob(repository, digest)
        if row is None:
            return None
        return await self._check(repository, digest, row, deadline, is_manifest=False)

    async def get_manifest(
        self, repository: Repository, digest: Digest, deadline: float
    ) -> BlobRow | None:
        """Return a stored manifest that may be served; None if upstream has to send it."""
        row = self._index.blob(repository, digest)
        if row is None or row.media_type is None:
            return None
        return await self._check(repository, digest, row, deadline, is_manifest=True)

    def start_check(self, repository: Repository, digest: Digest) -> None:
        """Ask for the proof that a stored blob needs, if any, in the background.

        Beyond `MAX_BACKGROUND_CHECKS` at a time this does nothing: a client's request will ask.
        """
        if len(self._checks) >= MAX_BACKGROUND_CHECKS:
            return

        async def check() -> BlobRow | None:
            return await self.get_blob(repository, digest, self._now() + RESPONSE_TIMEOUT)

        self._checks.start((repository, digest), check)

    async def may_join(self, repository: Repository, download: Download, deadline: float) -> bool:
        """Tell whether a download that has begun to arrive may be served under the repository."""
        is_linked = repository == download.repository or repository in download.shared_with
        decision = decide(is_linked=is_linked, is_from_upstream=True)
        if decision is Decision.PROVE and await self._request_proof(
            repository, download.digest, download.size, deadline, is_manifest=False
        ):
            # The commit links the repository, unless it is over.
            download.shared_with.add(repository)
            if self._index.has_sent(repository.upstream, download.digest):
                await self._link(repository, download.digest)
            return True
        return decision is Decision.SERVE

    async def _check(
        self,
        repository: Repository,
        digest: Digest,
        row: BlobRow,
        deadline: float,
        *,
        is_manifest: bool,
    ) -> BlobRow | None:
        """Return the row of stored content if it may be served, after a proof if it needs one."""
        is_sent = row.is_linked or self._index.has_sent(repository.upstream, digest)
        decision = decide(is_linked=row.is_linked, is_from_upstream=is_sent)
        if decision is Decision.PROVE and await self._request_proof(
            repository, digest, row.size, deadline, is_manifest=is_manifest
        ):
            await self._link(repository, digest)
            return self._index.blob(repository, digest)
        return row if decision is Decision.SERVE else None

    async def _link(self, repository: Repository, digest: Digest) -> None:
        """Link a repository that was proven to have a stored digest.

        If the index cannot be written, the next request asks upstream again.
        """
        try:
            await self._index.link(repository, digest)
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    async def _request_proof(
        self,
        repository: Repository,
        digest: Digest,
        size: int | None,
        deadline: float,
        *,
        is_manifest: bool,
    ) -> bool:
        """Ask the registry for a proof, once for all waiting requests; tell whether it gave one.

        Mirrors are not asked: many serve a digest under any name. But one may send all the bytes, so if
        there are any, an error of the registry decides nothing.
        """
        upstream = self._upstreams[repository.upstream]

        async def probe() -> Evidence:
            if is_manifest:
                named = (await upstream.resolve(repository.name, digest)).digest
                return Evidence(size=None, digest=named, is_html=False)
            return await upstream.probe_blob(repository.name, digest)

        try:
            async with enforce_deadline(deadline, repository.upstream):
                evidence = await self._probes.run((repository, digest, is_manifest), probe)
        except (
            DigestMismatchError,
            NotFoundError,
            UnsatisfiableRangeError,
            UpstreamUnauthorizedError,
        ):
            return False
        except UpstreamError:
            if upstream.has_mirrors:
                return False
            raise
        return is_proof(evidence, digest, size)
