"""The directory of a node that belongs to no fleet: it fetches everything from upstream."""

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager

from proxy.fleet.directory import FleetDownload, Member, PeerCopy, PeerFailure, SharedTag
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag


class Alone:
    """A directory without other members; nothing waits for anything."""

    is_blind = False
    problem = ""
    since = 0.0
    members: Sequence[Member] = ()

    def __init__(self) -> None:
        self._download = _LoneDownload()

    async def join(self) -> None:
        """Do nothing."""

    async def run(self) -> None:
        """Return at once."""

    async def leave(self) -> None:
        """Do nothing."""

    @asynccontextmanager
    async def downloading(self, upstream: str, digest: Digest) -> AsyncIterator[FleetDownload]:  # noqa: ARG002
        """Yield a download that is always fetched from upstream."""
        yield self._download

    async def is_held(self, digest: Digest) -> bool:  # noqa: ARG002
        """Return False: there is no other member."""
        return False

    def add_holdings(self, digests: Iterable[Digest]) -> None:
        """Do nothing."""

    def remove_holdings(self, digests: Iterable[Digest]) -> None:
        """Do nothing."""

    async def get_tag(self, repository: Repository, tag: Tag) -> SharedTag | None:  # noqa: ARG002
        """Return None: this node asks upstream."""
        return None

    async def set_tag(
        self, repository: Repository, tag: Tag, digest: Digest | None, *, ttl: float, keep: float
    ) -> None:
        """Do nothing."""

    async def release_tag(self, repository: Repository, tag: Tag) -> None:
        """Do nothing."""

    async def limit(self, upstream: str, scope: str, seconds: float) -> None:
        """Do nothing: the node remembers the limits of its own requests."""

    async def limited_for(self, upstream: str, scope: str) -> float:  # noqa: ARG002
        """Return 0."""
        return 0.0

    @asynccontextmanager
    async def lead(self, job: str, keep: float) -> AsyncIterator[bool]:  # noqa: ARG002
        """Yield True: no other node could do the job."""
        yield True


class _LoneDownload:
    """A download of a node without a fleet."""

    async def locate(self, busy: Collection[Member] = ()) -> PeerCopy | None:  # noqa: ARG002
        """Return None: fetch from upstream."""
        return None

    async def report(self, member: Member, failure: PeerFailure) -> None:
        """Do nothing: there is no member to fail."""
