"""Manifests and tags that the nodes of a fleet share, so that upstream is asked once for all of them.

`download/peer_route.py` does the same for blobs, under the same rules.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from proxy.fleet.directory import FleetDownload, Member, SharedTag
from proxy.log import get_logger
from proxy.lru import CachedManifest
from proxy.metrics import CacheState
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.upstream.client import FetchedManifest, Upstream
from proxy.upstream.peers import (
    MAX_ATTEMPTS,
    WAIT_INTERVAL,
    PeerBusyError,
    PeerClient,
    PeerError,
    PeerPermission,
    ask_permission,
)

# The longest time, in seconds, for which the fleet remembers a tag that never moves.
MAX_TAG_TTL = 30 * 86400.0

Result = tuple[CachedManifest, CacheState]
Store = Callable[[FetchedManifest], Awaitable[Result]]

log = get_logger(__name__)


class FleetManifests:
    """Manifests and tags of the fleet, for the node that `client` is of."""

    def __init__(self, client: PeerClient, upstreams: Mapping[str, Upstream]) -> None:
        self._client = client
        self._directory = client.directory
        self._upstreams = upstreams

    async def fetch(
        self,
        repository: Repository,
        digest: Digest,
        fetch: Callable[[], Awaitable[FetchedManifest]],
        store: Store,
    ) -> Result:
        """Fetch a manifest from a peer or, if none has it, by `fetch`; then `store` it.

        Other nodes that need it meanwhile wait for this one. Raises what the functions raise.
        """

        async def work(download: FleetDownload) -> Result:
            if fetched := await self._fetch_from_peer(download, repository, digest):
                manifest, state = await store(fetched)
                return manifest, "peer" if state == "miss" else state
            return await store(await fetch())

        return await self._announced(repository, digest, work)

    async def store(self, repository: Repository, fetched: FetchedManifest, store: Store) -> Result:
        """Store a manifest that upstream has sent, and tell the fleet at once."""

        async def work(_: FleetDownload) -> Result:
            return await store(fetched)

        return await self._announced(repository, fetched.digest, work)

    async def _announced(
        self,
        repository: Repository,
        digest: Digest,
        work: Callable[[FleetDownload], Awaitable[Result]],
    ) -> Result:
        """Run `work`, which fetches and stores a manifest, while the fleet knows of it."""
        try:
            async with self._directory.downloading(repository.upstream, digest) as download:
                result = await work(download)
                _raise_if_not_stored(result)
                return result
        except _ManifestNotStoredError as ended:
            return ended.result

    async def get_tag(self, repository: Repository, tag: Tag) -> SharedTag | None:
        """Return what `Directory.get_tag` does."""
        return await self._directory.get_tag(repository, tag)

    async def set_tag(
        self, repository: Repository, tag: Tag, digest: Digest | None, *, ttl: float, keep: float
    ) -> None:
        """Tell the fleet what upstream has just said of a tag; see `Directory.set_tag`."""
        ttl, keep = min(ttl, MAX_TAG_TTL), min(keep, MAX_TAG_TTL)
        await self._directory.set_tag(repository, tag, digest, ttl=ttl, keep=keep)

    async def release_tag(self, repository: Repository, tag: Tag) -> None:
        """Let another node ask upstream for a tag."""
        await self._directory.release_tag(repository, tag)

    async def _fetch_from_peer(
        self, download: FleetDownload, repository: Repository, digest: Digest
    ) -> FetchedManifest | None:
        """Return a manifest that a peer sends; None if upstream has to send it."""
        permission: PeerPermission | None = None

        async def prove() -> bool:
            upstream = self._upstreams[repository.upstream]
            return (await upstream.resolve(repository.name, digest)).digest == digest

        for _ in range(MAX_ATTEMPTS):
            if (copy := await download.locate()) is None:
                return None
            permission = permission or await ask_permission(prove)
            if permission is PeerPermission.REFUSED:
                return None
            fetched = await self._ask(download, copy.member, repository, digest, permission)
            if fetched:
                return fetched
        return None

    async def _ask(
        self,
        download: FleetDownload,
        member: Member,
        repository: Repository,
        digest: Digest,
        permission: PeerPermission,
    ) -> FetchedManifest | None:
        """Return a manifest that one peer sends, or None."""
        is_proven = permission is PeerPermission.PROVEN
        try:
            content, media_type = await self._client.fetch_manifest(
                member, repository, digest, is_proven=is_proven
            )
        except PeerBusyError:
            await asyncio.sleep(WAIT_INTERVAL)
            return None
        except PeerError as error:
            log.info("peer_failed", peer=member.address, digest=str(digest), reason=str(error))
            await download.report(member, error.failure)
            return None
        return FetchedManifest(content, media_type, digest, is_verified=True)


class _ManifestNotStoredError(Exception):
    """Ends the announcement of a manifest that could not be stored."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


def _raise_if_not_stored(result: Result) -> None:
    if result[1] == "bypass":
        raise _ManifestNotStoredError(result)
