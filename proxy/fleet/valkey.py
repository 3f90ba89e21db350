"""The directory of a fleet in a Valkey or Redis server."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from proxy.config import FleetSettings
from proxy.errors import InvalidDigestError
from proxy.fleet import scripts
from proxy.fleet.directory import FleetDownload, Member, PeerCopy, PeerFailure, SharedTag
from proxy.fleet.holdings import HOLDERS_TTL, HoldingsAnnouncer, ListHoldings
from proxy.fleet.keys import BlobKeys, FleetKeys, node_id
from proxy.fleet.membership import Membership
from proxy.fleet.memory import RecentValues
from proxy.fleet.server import DirectoryBlindError, FleetServer
from proxy.log import get_logger
from proxy.metrics import FleetSource, Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag

# Seconds for which a member that sent wrong bytes for a digest is not asked for it, and how many such are kept.
BARRED_TTL = 600.0
MAX_BARRED = 1000
# Seconds for which a member that could not be reached is not asked for anything.
UNREACHABLE_TTL = 5.0
# Members that `locate` is told not to return.
MAX_EXCLUDED = 64
# Questions of one `locate`: the directory may return members that are gone.
MAX_LOCATE_ATTEMPTS = 4
# Seconds in which a node that was told to ask upstream for a tag does so, for which the others wait for it, and
# between two looks.
TAG_LEASE = 15.0
TAG_WAIT = 5.0
TAG_POLL = 0.03
# How long a stale tag is kept at most.
MAX_TAG_AGE = 90 * 86_400.0

log = get_logger(__name__)


class ValkeyDirectory:
    """The directory of one fleet. `run` works in the background; then `close`.

    `instance` tells daemons with one address apart. `list_holdings` returns what the store has.
    """

    def __init__(
        self,
        settings: FleetSettings,
        metrics: Metrics,
        *,
        instance: str,
        version: str,
        list_holdings: ListHoldings,
        ca: str = "",
        protocol: int | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._silence = int(settings.heartbeat * 3000)
        self._keys = (
            FleetKeys(settings.name) if protocol is None else FleetKeys(settings.name, protocol)
        )
        self._id = node_id(settings.address)
        self._instance = instance
        metrics.enable_fleet(lambda: not self.is_blind, lambda: len(self.members) + 1)
        self._server = FleetServer(settings, metrics, self._note_blind, ca)
        own = Member(str(settings.address), instance, version)
        self._membership = Membership(self._server, self._keys, own, settings.heartbeat)
        self._holdings = HoldingsAnnouncer(self._server, self._keys, self._id, list_holdings)
        self._membership.on_join = self._rejoin
        self._downloads: set[_ValkeyDownload] = set()
        self._jobs: set[str] = set()
        self._barred: RecentValues[Digest, frozenset[str]] = RecentValues(MAX_BARRED, BARRED_TTL)
        self._unreachable: RecentValues[str, bool] = RecentValues(MAX_EXCLUDED, UNREACHABLE_TTL)
        self._now = asyncio.get_running_loop().time

    @property
    def is_blind(self) -> bool:
        """Whether the directory cannot be asked now."""
        return self._server.is_blind

    @property
    def problem(self) -> str:
        """Why the directory cannot be asked; empty if it can."""
        return self._membership.problem if self.is_blind else ""

    @property
    def since(self) -> float:
        """Since when the directory can be asked, or cannot, in Unix time."""
        return self._membership.changed_at

    @property
    def members(self) -> Sequence[Member]:
        """The other live members."""
        return self._membership.others

    async def join(self) -> None:
        """Try once to join the fleet; takes a second at most."""
        await self._membership.beat()

    async def run(self) -> None:
        """Report to the fleet until cancelled, and join it as soon as that is possible."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._holdings.run())
            group.create_task(self._beat())

    async def leave(self) -> None:
        """Tell the others that this node is about to stop."""
        await self._membership.leave()

    async def close(self) -> None:
        """Leave the fleet, and close the connections with the server."""
        await self.leave()
        await self._server.close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._membership.interval)
            await self._membership.beat()
            await self._renew()

    async def _renew(self) -> None:
        """Tell the directory which downloads and jobs of this node still run."""
        calls: list[Any] = [
            (scripts.RENEW, download.keys[1:], (self._id, download.place, self._silence))
            for download in self._downloads
            if download.place
        ]
        calls += [
            (scripts.LEAD, (self._keys.job(job),), (self._instance, self._silence))
            for job in self._jobs
        ]
        if calls and not self.is_blind:
            await self._ask_many("renew", calls)

    async def _ask_many(self, operation: Any, calls: list[Any]) -> bool:
        try:
            async with self._server.asking(operation):
                await self._server.run_many(calls)
        except DirectoryBlindError:
            return False
        return True

    async def _ask(self, operation: Any, script: str, keys: tuple[str, ...], *args: Any) -> Any:
        """Return the answer of a script. Raises `DirectoryBlindError`."""
        async with self._server.asking(operation):
            return await self._server.run(script, keys, *args)

    def _note_blind(self, reason: str) -> None:
        self._membership.note_blind(reason)

    def _rejoin(self, *, is_unknown: bool) -> None:
        """Continue with announcements; all of them if the directory has forgotten this node."""
        if is_unknown:
            self._holdings.announce_all()
        self._holdings.resume()

    @asynccontextmanager
    async def downloading(self, upstream: str, digest: Digest) -> AsyncIterator[FleetDownload]:
        """Announce that this node fetches a blob during the block, and has it afterwards."""
        download = _ValkeyDownload(self, digest, self._keys.blob(upstream, digest))
        self._downloads.add(download)
        is_stored = False
        try:
            yield download
            is_stored = True
        finally:
            self._downloads.discard(download)
            await self._finish(download, is_stored=is_stored)

    async def _finish(self, download: "_ValkeyDownload", *, is_stored: bool) -> None:
        ttl = int(HOLDERS_TTL * 1000)
        try:
            others = await self._ask(
                "finish", scripts.FINISH, tuple(download.keys), self._id, ttl, int(is_stored)
            )
        except DirectoryBlindError:
            if is_stored:
                self.add_holdings([download.digest])
            return
        if is_stored:
            upstream: FleetSource = "duplicate" if others else "upstream"
            self._metrics.count_fleet_download(upstream if download.is_from_upstream else "peer")

    async def locate(
        self, download: "_ValkeyDownload", busy: Collection[Member]
    ) -> PeerCopy | None:
        """Return the member to fetch a blob from; None for upstream."""
        gone: list[str] = []
        failed = {*download.failed, *(self._barred.get(download.digest) or ())}
        failed |= {node_id(member.address) for member in busy}
        for _ in range(MAX_LOCATE_ATTEMPTS):
            try:
                found = await self._ask_place(download, gone, failed)
            except DirectoryBlindError:
                return None
            download.place = found[0]
            download.is_from_upstream = found[1] == 0
            if download.is_from_upstream:
                return None
            member = await self._membership.find(found[2])
            if member:
                return PeerCopy(member, is_whole=found[1] == 1)
            download.is_from_upstream = True
            if self._membership.is_forgotten(found[2]):
                gone.append(found[2])
            else:
                failed.add(found[2])
        return None

    async def _ask_place(
        self, download: "_ValkeyDownload", gone: list[str], failed: set[str]
    ) -> Any:
        excluded = [*failed, *self._unreachable.keys(), *self._membership.silent][:MAX_EXCLUDED]
        return await self._ask(
            "locate",
            scripts.LOCATE,
            tuple(download.keys),
            self._id,
            download.place,
            self._settings.children,
            self._silence,
            int(download.digest.hex[:6], 16),
            len(gone),
            *gone,
            *excluded,
        )

    async def report(
        self, download: "_ValkeyDownload", member: Member, failure: PeerFailure
    ) -> None:
        """Record that a copy failed."""
        member_id = node_id(member.address)
        download.failed.add(member_id)
        if failure == "connect":
            self._unreachable.set(member_id, True)
        if failure == "wrong_bytes":
            barred = self._barred.get(download.digest) or frozenset()
            self._barred.set(download.digest, barred | {member_id})
            log.warning("fleet_member_barred", member=member.address, digest=str(download.digest))
        if failure in {"wrong_bytes", "absent"}:
            keys = (download.keys.holders,)
            await self._ask_many("holdings", [(scripts.REMOVE, keys, (member_id,))])

    async def is_held(self, digest: Digest) -> bool:
        """Tell whether another live member has all of a blob."""
        try:
            async with self._server.asking("holdings"):
                found: Any = await self._server.command("SMEMBERS", self._keys.holders(digest))
        except DirectoryBlindError:
            return False
        barred = self._barred.get(digest) or frozenset()
        for holder in {*found} - {self._id, *barred}:
            if await self._membership.find(holder):
                return True
        return False

    def add_holdings(self, digests: Iterable[Digest]) -> None:
        """Announce that this node has these blobs."""
        self._holdings.change(digests, is_held=True)

    def remove_holdings(self, digests: Iterable[Digest]) -> None:
        """Announce that this node no longer has these blobs."""
        self._holdings.change(digests, is_held=False)

    async def get_tag(self, repository: Repository, tag: Tag) -> SharedTag | None:
        """Return what the fleet knows of a tag; not fresh or None if the caller is to ask upstream."""
        keys = self._keys.tag(repository, tag)
        deadline = self._now() + TAG_WAIT
        while True:
            try:
                answer = await self._ask(
                    "tag", scripts.GET_TAG, tuple(keys), self._instance, int(TAG_LEASE * 1000)
                )
            except DirectoryBlindError:
                return None
            is_fresh, is_ours, digest, age = answer
            if is_fresh or is_ours or self._now() >= deadline:
                break
            await asyncio.sleep(TAG_POLL)
        if digest is None:
            return None
        try:
            return SharedTag(Digest.parse(digest) if digest else None, age / 1000, bool(is_fresh))
        except InvalidDigestError:
            return None  # no node wrote it

    async def set_tag(
        self, repository: Repository, tag: Tag, digest: Digest | None, *, ttl: float, keep: float
    ) -> None:
        """Record what upstream has just said of a tag."""
        keys = tuple(self._keys.tag(repository, tag))
        kept = min(ttl + keep, MAX_TAG_AGE)
        arguments = (
            self._instance,
            str(digest) if digest else "",
            int(ttl * 1000),
            max(1, int(kept * 1000)),
        )
        await self._ask_many("tag", [(scripts.SET_TAG, keys, arguments)])

    async def release_tag(self, repository: Repository, tag: Tag) -> None:
        """Let another node ask upstream for a tag."""
        keys = (self._keys.tag(repository, tag).lease,)
        await self._ask_many("tag", [(scripts.RELEASE, keys, (self._instance,))])

    async def limit(self, upstream: str, scope: str, seconds: float) -> None:
        """Record that upstream must not be asked for some seconds."""
        keys = (self._keys.limit(upstream, scope),)
        await self._ask_many("limit", [(scripts.LIMIT, keys, (max(1, int(seconds * 1000)),))])

    async def limited_for(self, upstream: str, scope: str) -> float:
        """Return the seconds for which upstream must not be asked."""
        try:
            async with self._server.asking("limit"):
                left = await self._server.command("PTTL", self._keys.limit(upstream, scope))
        except DirectoryBlindError:
            return 0.0
        return max(0, int(left)) / 1000

    @asynccontextmanager
    async def lead(self, job: str, keep: float) -> AsyncIterator[bool]:
        """Yield whether this node is to do a job."""
        milliseconds = max(int(keep * 1000), self._silence)
        try:
            keys = (self._keys.job(job),)
            answer = await self._ask("lead", scripts.LEAD, keys, self._instance, milliseconds)
            is_leader = bool(answer)
        except DirectoryBlindError:
            is_leader = True
        if is_leader:
            self._jobs.add(job)
        try:
            yield is_leader
        finally:
            if is_leader:
                self._jobs.discard(job)


class _ValkeyDownload:
    """A download of this node."""

    def __init__(self, directory: ValkeyDirectory, digest: Digest, keys: BlobKeys) -> None:
        self.digest = digest
        self.keys = keys
        # In the order of those that download the blob; empty before the first answer.
        self.place = ""
        # Whether the last answer was to fetch from upstream.
        self.is_from_upstream = True
        # Ids of members whose copy failed.
        self.failed: set[str] = set()
        self._directory = directory

    async def locate(self, busy: Collection[Member] = ()) -> PeerCopy | None:
        """Return the member to fetch from now; None: fetch from upstream."""
        return await self._directory.locate(self, busy)

    async def report(self, member: Member, failure: PeerFailure) -> None:
        """Record that the copy of `member` failed."""
        await self._directory.report(self, member, failure)
