"""The members of a fleet: this node reports to the directory, and learns which others do."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from proxy.config.values import OptionalUrl
from proxy.fleet import scripts
from proxy.fleet.directory import Member
from proxy.fleet.keys import FleetKeys, node_id
from proxy.fleet.server import DirectoryBlindError, FleetServer
from proxy.log import get_logger

# Seconds after which a silent node is forgotten. It announces all of its blobs when it is back.
FORGET_AFTER = 60.0
# Seconds for which the directory is not asked after a failure.
BLIND_TIME = 2.0
# The rows of n members are read at most every n times this, in seconds: what all nodes read stays below 50 rows
# times the number of nodes a second.
READ_TIME = 0.02
# Seconds between two looks for nodes with another version of the protocol.
PROTOCOL_INTERVAL = 30.0

# Why the directory is blind although the server answers.
_ADDRESS_TAKEN = "address"

log = get_logger(__name__)


class OnJoin(Protocol):
    """What is called when the directory can be asked again; `is_unknown` if it knows nothing of this node."""

    def __call__(self, *, is_unknown: bool) -> None:
        """Continue."""


class Membership:
    """The membership of this node. Call `beat` every `interval` seconds."""

    def __init__(self, server: FleetServer, keys: FleetKeys, own: Member, heartbeat: float) -> None:
        self.silent: Sequence[str] = ()
        self.on_join: OnJoin = _do_nothing
        self._server = server
        self._keys = keys
        self._own = own
        self._id = node_id(own.address)
        self._row = f"{own.instance} {msgspec.json.encode(own).decode()}"
        self._heartbeat = heartbeat
        self._members: dict[str, Member] = {}
        self._others: Sequence[Member] = ()
        self._version = ""
        self._epoch = ""
        self._read_at = 0.0
        self._looked_at = 0.0
        self._answered_at = 0.0
        self._other_protocols: set[str] = set()
        # When the other daemon with this node's address was seen, and why the directory is blind.
        self._rival_beat = ""
        self._reason = ""
        # When the directory became blind, or no longer was, in Unix time.
        self.changed_at = time.time()
        self._has_left = False
        self._now = asyncio.get_running_loop().time

    @property
    def others(self) -> Sequence[Member]:
        """The other live members."""
        return self._others

    @property
    def problem(self) -> str:
        """Why the directory cannot be asked, while it cannot."""
        if self._reason == _ADDRESS_TAKEN:
            return "another node has this fleet.address: each needs its own"
        return self._reason or "the server has not answered yet"

    @property
    def interval(self) -> float:
        """Seconds until the next beat."""
        return min(self._heartbeat, BLIND_TIME) if self._server.is_blind else self._heartbeat

    async def beat(self) -> None:
        """Report that this node lives, and read what has changed."""
        if self._has_left:
            return
        was_blind = self._server.is_blind
        try:
            async with self._server.asking("beat", is_check=True):
                answer = await self._server.run(
                    scripts.BEAT,
                    (self._keys.rows, self._keys.beats, self._keys.state),
                    self._id,
                    self._own.instance,
                    self._row,
                    int(self._heartbeat * 3000),
                    int(FORGET_AFTER * 1000),
                    secrets.token_hex(8),
                )
            if not answer[0]:
                self._refuse(str(answer[1]))
                return
            _, now, version, epoch, self.silent = answer
            await self._read_rows(version)
            await self._check_protocols(int(now))
        except DirectoryBlindError:
            return
        self._update_others()
        self._note_joined(epoch, was_blind=was_blind)

    async def leave(self) -> None:
        """Tell the others that this node is gone; it does not report again."""
        if self._has_left or self._server.is_blind:
            return
        self._has_left = True
        try:
            async with self._server.asking("beat"):
                keys = (self._keys.rows, self._keys.beats, self._keys.state)
                await self._server.run(scripts.LEAVE, keys, self._id, self._own.instance)
        except DirectoryBlindError:
            pass

    async def find(self, member_id: str) -> Member | None:
        """Return the live member with this id; reads the rows if it is new."""
        if member_id not in self._members and member_id not in self.silent:
            try:
                await self._read_rows("")
            except DirectoryBlindError:
                return None
            self._update_others()
        return None if member_id in self.silent else self._members.get(member_id)

    def is_forgotten(self, member_id: str) -> bool:
        """Tell whether the directory no longer knows a member, which may have been silent for long."""
        return member_id not in self._members

    def note_blind(self, reason: str) -> None:
        """Say once why the directory cannot be asked."""
        if reason != self._reason:
            self._note_change()
            self._reason = reason
            log.warning(
                "fleet_blind", reason=reason, help="until then this node fetches from upstream"
            )

    def _note_change(self) -> None:
        """Remember since when the directory is blind, unless it was before."""
        if not self._reason:
            self.changed_at = time.time()

    def _refuse(self, beat: str) -> None:
        """Stay alone while another daemon has this node's address.

        It may be this node's own former process, which was killed; then it does not beat again.
        """
        self._server.is_blind = True
        if self._rival_beat not in {"", beat} and self._reason != _ADDRESS_TAKEN:
            self._note_change()
            self._reason = _ADDRESS_TAKEN
            log.error(
                "fleet_address_taken",
                address=self._own.address,
                help="another node has this fleet.address: each needs its own",
            )
        self._rival_beat = beat

    def _note_joined(self, epoch: str, *, was_blind: bool) -> None:
        is_first = not self._epoch
        is_emptied = not is_first and epoch != self._epoch
        was_forgotten = self._now() - self._answered_at > FORGET_AFTER
        self._epoch, self._answered_at, self._rival_beat = epoch, self._now(), ""
        if is_emptied:
            log.warning("fleet_directory_emptied", help="all nodes announce what they have")
        if was_blind:
            self._reason, self.changed_at = "", time.time()
            log.info("fleet_joined", members=len(self._others) + 1)
        if was_blind or is_emptied:
            self.on_join(is_unknown=is_first or is_emptied or was_forgotten)

    async def _read_rows(self, version: str) -> None:
        """Read the rows of all members, unless this version was read, or others just now."""
        if version and version == self._version:
            return
        if version and self._now() - self._read_at < len(self._members) * READ_TIME:
            return
        self._read_at = self._now()
        async with self._server.asking("members"):
            found: Any = await self._server.command("HGETALL", self._keys.rows)
        rows = dict(zip(found[::2], found[1::2], strict=True)) if isinstance(found, list) else found
        members = ((key, decode_row(row)) for key, row in rows.items())
        self._members = {
            key: member for key, member in members if member and node_id(member.address) == key
        }
        self._version = version

    async def _check_protocols(self, now: int) -> None:
        """Note which version this node speaks, and say if others speak another one."""
        if self._looked_at and self._now() - self._looked_at < PROTOCOL_INTERVAL:
            return
        self._looked_at = self._now()
        key, oldest = self._keys.protocols, now - int(2 * PROTOCOL_INTERVAL * 1000)
        async with self._server.asking("members"):
            await self._server.command("ZADD", key, now, self._keys.protocol)
            await self._server.command("ZREMRANGEBYSCORE", key, "-inf", oldest)
            found = await self._server.command("ZRANGE", key, 0, -1)
        others = {*found} - {str(self._keys.protocol)}
        if others - self._other_protocols:
            log.warning(
                "fleet_protocols_differ",
                protocol=self._keys.protocol,
                others=sorted(others),
                help="nodes of two versions are two fleets: upgrade all of them",
            )
        self._other_protocols = others

    def _update_others(self) -> None:
        silent = {self._id, *self.silent}
        self._others = [one for key, one in self._members.items() if key not in silent]


def decode_row(row: str) -> Member | None:
    """Return the member in a row, without what a newer version has added to it; None if no node wrote the row."""
    try:
        member = msgspec.json.decode(row.partition(" ")[2], type=Member)
        OptionalUrl.parse(member.address)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return member


def _do_nothing(*, is_unknown: bool) -> None:
    """Stand in for a listener."""
