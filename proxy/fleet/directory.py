"""The directory of a fleet: its members, which of them has or downloads a blob, and what is known of tags.

Nothing here is needed for correctness. Content is verified by its digest wherever it comes from, so a wrong or
lost entry costs a transfer. No method raises because the directory cannot be asked: each says what it returns then.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag

# Why a copy of a member could not be used:
# - connect: the member cannot be reached
# - stall: it stopped sending, or sends too slowly
# - broken: it closed the connection, or answered with 5xx
# - wrong_bytes: the digest of what it sent was wrong
# - absent: it says that it neither has nor downloads the digest
# - unlinked: it has the digest, but not for this repository; it stays a holder
PeerFailure = Literal["connect", "stall", "broken", "wrong_bytes", "absent", "unlinked"]


class Member(msgspec.Struct, frozen=True):
    """A node of the fleet. `address` is its URL; `instance` is new with each start of its daemon."""

    address: str
    instance: str
    version: str = ""


class PeerCopy(msgspec.Struct, frozen=True):
    """A member to fetch a blob from: it has all of it, or is downloading it."""

    member: Member
    is_whole: bool


class SharedTag(msgspec.Struct, frozen=True):
    """What a member has learnt of a tag `age` seconds ago; without digest: that upstream does not have it."""

    digest: Digest | None
    age: float
    is_fresh: bool


class FleetDownload(Protocol):
    """One download of this node, as the fleet sees it."""

    async def locate(self, busy: Collection[Member] = ()) -> PeerCopy | None:
        """Return the member to fetch from now, none of `busy`; None: fetch from upstream.

        Ask again after a failure, or when a transfer from upstream could not be resumed. Members that began after
        this node are never returned, so that nodes never wait for each other. None if the directory is blind.
        """

    async def report(self, member: Member, failure: PeerFailure) -> None:
        """Record that the copy of `member` failed: `locate` does not return it again for this download.

        A member that sent wrong bytes is barred for the digest on this node, also in later downloads. It and one
        that says that it does not have the digest are no longer found as holders.
        """


class Directory(Protocol):
    """What the nodes of a fleet know of each other."""

    @property
    def is_blind(self) -> bool:
        """Whether the directory cannot be asked now; the node then works as if it were alone."""

    @property
    def problem(self) -> str:
        """Why the directory cannot be asked; empty if it can."""

    @property
    def since(self) -> float:
        """Since when the directory can be asked, or cannot, in Unix time."""

    @property
    def members(self) -> Sequence[Member]:
        """The other live members, as far as this node knows."""

    async def join(self) -> None:
        """Try once to join the fleet; takes a second at most."""

    async def run(self) -> None:
        """Report to the fleet until cancelled, and join it as soon as that is possible."""

    async def leave(self) -> None:
        """Tell the others that this node is about to stop."""

    def downloading(
        self, upstream: str, digest: Digest
    ) -> AbstractAsyncContextManager[FleetDownload]:
        """Announce that this node fetches a blob during the block; others may then be sent here.

        Enter it before the first byte is requested, for each download of the node once. If the block ends without
        an exception the node has the blob, which the others learn at the same moment.
        """

    async def is_held(self, digest: Digest) -> bool:
        """Tell whether another live member has all of a blob. False if the directory is blind."""

    def add_holdings(self, digests: Iterable[Digest]) -> None:
        """Announce, soon and in batches, that this node has these blobs."""

    def remove_holdings(self, digests: Iterable[Digest]) -> None:
        """Announce, soon and in batches, that this node no longer has these blobs."""

    async def get_tag(self, repository: Repository, tag: Tag) -> SharedTag | None:
        """Return what the fleet knows of a tag.

        If the answer is None or not fresh, the caller asks upstream for the fleet, and then calls `set_tag` or
        `release_tag`. Waits a moment for another node that is asking upstream. None if the directory is blind.
        """

    async def set_tag(
        self, repository: Repository, tag: Tag, digest: Digest | None, *, ttl: float, keep: float
    ) -> None:
        """Record what upstream has just said of a tag: fresh for `ttl` seconds, then stale for `keep` more."""

    async def release_tag(self, repository: Repository, tag: Tag) -> None:
        """Let another node ask upstream for a tag, because this one got no answer."""

    async def limit(self, upstream: str, scope: str, seconds: float) -> None:
        """Record that upstream must not be asked for some seconds; `scope` says which requests."""

    async def limited_for(self, upstream: str, scope: str) -> float:
        """Return the seconds for which upstream must not be asked; 0 if it may, or the directory is blind."""

    def lead(self, job: str, keep: float) -> AbstractAsyncContextManager[bool]:
        """Yield whether this node is to do a job, which another member then does not do.

        For the time of the block, and for `keep` seconds from its beginning at least. Every node is to do it while
        the directory is blind.
        """
