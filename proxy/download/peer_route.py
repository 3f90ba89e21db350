"""From where one download gets its bytes: from a peer of the fleet as long as one has them, else from upstream.

A peer is asked only after the registry has proven that the repository has the blob, or if the registry cannot be
asked: then the peer answers only under a repository that it has served the blob under.
"""

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

from proxy.fleet.directory import FleetDownload, Member
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.upstream.client import Upstream
from proxy.upstream.peers import (
    MAX_ATTEMPTS,
    WAIT_INTERVAL,
    PeerBody,
    PeerBusyError,
    PeerClient,
    PeerError,
    PeerFullError,
    PeerPermission,
    ask_permission,
)
from proxy.upstream.responses import Evidence, is_proof

# How long, in seconds, a peer may wait for the blob itself.
MAX_WAIT = 60.0
# Peers that are asked in turn if each sends the blob to as many others as it may, before a pause.
MAX_BUSY = 4
# Seconds after which a peer has to send it all the same: a node never waits for good.
INSIST_AFTER = 5.0

log = get_logger(__name__)


class PeerRoute:
    """The peers of one download. The fleet is told of the download at the first `open`, and of its end by `close`.

    `path` names the nodes that the bytes come through now, beginning with this one.
    """

    def __init__(
        self, client: PeerClient, upstream: Upstream, repository: Repository, digest: Digest
    ) -> None:
        self._client = client
        self._upstream = upstream
        self._repository = repository
        self._digest = digest
        self._announcement: AbstractAsyncContextManager[FleetDownload] | None = None
        self._download: FleetDownload | None = None
        self._is_asking = True
        self._attempts = 0
        self._wait_until = 0.0
        # Peers that send the blob to as many others as they may, and when one has said so first.
        self._busy: list[Member] = []
        self._busy_since: float | None = None
        self._permission: PeerPermission | None = None
        self._evidence: Evidence | None = None
        self._senders: dict[str, Member] = {}
        self.path: tuple[str, ...] = (client.node_id,)

    def ask_again(self) -> None:
        """Look for a peer at the next `open`, because the transfer from upstream has failed."""
        self._is_asking = self._attempts < MAX_ATTEMPTS

    async def open(self, stack: AsyncExitStack, offset: int) -> PeerBody | None:
        """Open the blob at a peer, in a context of `stack`; None if upstream has to send it."""
        if not self._is_asking:
            return None
        if self._download is None:
            directory = self._client.directory
            self._announcement = directory.downloading(self._upstream.name, self._digest)
            self._download = await self._announcement.__aenter__()
        self._wait_until = asyncio.get_running_loop().time() + MAX_WAIT
        while member := await self._next_member():
            try:
                body = await self._open_at(stack, member, offset)
            except PeerBusyError as error:
                await self._wait(member, error)
            except PeerError as error:
                await self.leave(error)
            else:
                self._busy, self._busy_since = [], None
                if body is None:
                    break
                self.path = (self._client.node_id, *body.path)
                return body
        self._is_asking = False
        self.path = (self._client.node_id,)
        return None

    async def _next_member(self) -> Member | None:
        """Return the peer to ask now; None if upstream is to be asked."""
        assert self._download is not None
        if self._attempts >= MAX_ATTEMPTS:
            return None
        copy = None
        if len(self._busy) < MAX_BUSY:
            copy = await self._download.locate(self._busy)
        if copy is None and self._busy:
            self._busy = []
            await asyncio.sleep(WAIT_INTERVAL)
            copy = await self._download.locate()
        return copy.member if copy and await self._may_ask() else None

    async def _wait(self, member: Member, error: PeerBusyError) -> None:
        """Wait before a peer that waits for the blob itself is asked again, or leave it after `MAX_WAIT`.

        If a peer sends it to as many others as it may, the next one is asked at once.
        """
        now = asyncio.get_running_loop().time()
        if isinstance(error, PeerFullError) and now < self._wait_until:
            self._busy.append(member)
            self._busy_since = self._busy_since or now
        elif now < self._wait_until:
            await asyncio.sleep(WAIT_INTERVAL)
        else:
            await self.leave(PeerError(str(error), member, "stall"))

    async def leave(self, error: PeerError) -> None:
        """Report a peer that has failed: the next `open` takes another way."""
        self._attempts += 1
        if error.failure in ("absent", "unlinked"):
            log.debug("peer_lacks_blob", peer=error.member.address, digest=str(self._digest))
        else:
            log.info(
                "peer_failed",
                peer=error.member.address,
                digest=str(self._digest),
                reason=str(error),
            )
        if self._download:
            await self._download.report(error.member, error.failure)

    async def bar_senders(self) -> None:
        """Bar the peers that have sent bytes of a blob whose digest is wrong, and ask upstream from now on."""
        senders, self._senders = self._senders, {}
        self._attempts, self._is_asking = MAX_ATTEMPTS, False
        for member in senders.values():
            self._client.record_failure("wrong_bytes")
            log.warning("peer_sent_wrong_bytes", peer=member.address, digest=str(self._digest))
            if self._download:
                await self._download.report(member, "wrong_bytes")

    @property
    def has_received(self) -> bool:
        """Whether a peer has sent bytes of the blob."""
        return bool(self._senders)

    async def close(self, *, is_stored: bool) -> None:
        """Tell the fleet that this node has the blob, or that it has given up."""
        announcement, self._announcement = self._announcement, None
        self._is_asking = False
        if announcement is None:
            return
        if is_stored:
            await announcement.__aexit__(None, None, None)
            return
        error = _BlobNotStoredError()
        with suppress(_BlobNotStoredError):
            await announcement.__aexit__(_BlobNotStoredError, error, error.__traceback__)

    async def _open_at(self, stack: AsyncExitStack, member: Member, offset: int) -> PeerBody | None:
        """Open the blob at one peer; None if it is not the blob that the registry has proven."""
        is_proven = self._permission is PeerPermission.PROVEN
        now = asyncio.get_running_loop().time()
        insists = self._busy_since is not None and now - self._busy_since > INSIST_AFTER
        body = await stack.enter_async_context(
            self._client.open_blob(
                member,
                self._repository,
                self._digest,
                offset,
                is_proven=is_proven,
                insists=insists,
            )
        )
        if self._evidence and not is_proof(self._evidence, self._digest, body.size):
            await stack.aclose()
            return None
        self._senders[member.address] = member
        return body

    async def _may_ask(self) -> bool:
        """Tell whether peers may be asked: by the registry's proof, or because it cannot be asked."""
        if self._permission is None:
            self._permission = await ask_permission(self._ask_registry)
        return self._permission is not PeerPermission.REFUSED

    async def _ask_registry(self) -> bool:
        self._evidence = await self._upstream.probe_blob(self._repository.name, self._digest)
        return True


class _BlobNotStoredError(Exception):
    """Ends the announcement of a download that has not stored the blob."""
