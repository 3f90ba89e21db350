"""A simulated roll-out of an image to many nodes, with the real directory of a fleet.

The directory is `ValkeyDirectory` and its scripts against a real redis-server: each node of the simulation asks it as
a daemon does, in the order of simulated time. Simulated are the transfers and the time. Edges are in zones, each a
fleet of its own; they ask the central nodes, one more fleet, which ask upstream.

    .venv/bin/python -m tests.bench.fleet_rollout --nodes 10000
"""

import argparse
import asyncio
import copy
import heapq
import json
import random
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from proxy.config import FleetSettings
from proxy.config.values import FleetName, OptionalUrl, PositiveDuration, ValkeyUrl
from proxy.download.peer_route import INSIST_AFTER, MAX_BUSY
from proxy.fleet import scripts
from proxy.fleet.directory import FleetDownload, Member
from proxy.fleet.keys import node_id
from proxy.fleet.memory import RecentValues
from proxy.fleet.valkey import (
    BARRED_TTL,
    MAX_BARRED,
    MAX_EXCLUDED,
    UNREACHABLE_TTL,
    ValkeyDirectory,
)
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.upstream.peers import WAIT_INTERVAL
from tests.support.redis_server import RedisServer

MIB = 1 << 20
UPSTREAM = "docker.io"
# A config and nine layers, 1 GiB in all.
SIZES = (10_000, *(size * MIB for size in (512, 256, 128, 64, 32, 16, 8, 4, 4)))
# Longer than any run: simulated nodes do not beat.
HEARTBEAT = 3600.0
# Questions of one kind whose cost is measured.
REPEATED = 300


@dataclass(frozen=True)
class RolloutWorld:
    """What is simulated: sizes in bytes, rates in bytes per second, times in seconds.

    `parallel` is how many blobs a client fetches at a time. A node may feed `children` others with each of them, so
    that one transfer gets that part of a link; `spread` is the time in which all nodes begin. A first byte takes
    `hop`; measured were 7 to 14 ms. A question to the directory takes `question` of the server's CPU time.
    """

    nodes: int = 10_000
    zones: int = 5
    central: int = 6
    sizes: Sequence[int] = SIZES
    parallel: int = 3
    children: int = 4
    link: float = 1.25e9
    central_link: float = 3.1e9
    upstream_rate: float = 125e6
    spread: float = 1.0
    hop: float = 0.01
    question: float = 100e-6


@dataclass
class SimulatedTransfer:
    """A blob of a node: when it is complete, and which node it comes from.

    `depth` is how many nodes its first byte passes while they receive the blob themselves.
    """

    done_at: float
    depth: int
    entered: AbstractAsyncContextManager[FleetDownload]
    source: "SimulatedNode | None" = None


@dataclass
class SimulatedSearch:
    """A node that looks for a blob. Those in `busy` feed enough others; the first was asked at `since`."""

    entered: AbstractAsyncContextManager[FleetDownload]
    download: FleetDownload
    busy: list[Member] = field(default_factory=list)
    since: float | None = None


@dataclass
class SimulatedNode:
    """A node, its place in the directory, its blobs by number, and how many nodes get each from it now."""

    fleet: "SimulatedFleet"
    address: str
    directory: ValkeyDirectory
    is_edge: bool
    blobs: dict[int, SimulatedTransfer] = field(default_factory=dict)
    searches: dict[int, SimulatedSearch] = field(default_factory=dict)
    feeding: Counter[int] = field(default_factory=Counter)
    begun: int = 0
    stored: int = 0


class SimulatedFleet:
    """A fleet whose nodes share one connection with the server, and know all members."""

    def __init__(self, number: int, world: RolloutWorld, redis: RedisServer) -> None:
        self._number = number
        self.free_at = 0.0
        self.longest_wait = 0.0
        self.questions: Counter[int] = Counter()
        self._question = world.question
        self._first = ValkeyDirectory(
            FleetSettings(
                valkey=ValkeyUrl.parse(redis.url),
                name=FleetName(f"fleet{number}"),
                address=OptionalUrl(self.address(0)),
                heartbeat=PositiveDuration(HEARTBEAT),
                # This machine does other things too.
                answer_timeout=PositiveDuration(60.0),
                children=world.children,
            ),
            Metrics([], "0"),
            instance="0",
            version="0",
            list_holdings=lambda *_: [],
        )

    def address(self, index: int) -> str:
        """Return the address of a node. Between nodes on loopback no token is needed."""
        return f"http://127.0.{self._number}.1:{5000 + index}"

    async def join(self, number: int) -> list[ValkeyDirectory]:
        """Make all nodes members by the real script, and return their directories."""
        first = self._first
        await first.join()
        keys, silence = first._keys, int(HEARTBEAT * 3000)
        for index in range(1, number):
            member = Member(self.address(index), str(index), "0")
            row = f"{index} {msgspec.json.encode(member).decode()}"
            names = (keys.rows, keys.beats, keys.state)
            arguments = (node_id(member.address), str(index), row, silence, silence, "epoch")
            await first._server.run(scripts.BEAT, names, *arguments)
        await first._membership._read_rows("")
        first._membership._update_others()
        return [first, *(self._copy(index) for index in range(1, number))]

    def _copy(self, index: int) -> ValkeyDirectory:
        """Return the directory of another node, which shares the connection and the list of members."""
        directory = copy.copy(self._first)
        directory._id = node_id(self.address(index))
        directory._instance = str(index)
        directory._downloads = set()
        directory._barred = RecentValues(MAX_BARRED, BARRED_TTL)
        directory._unreachable = RecentValues(MAX_EXCLUDED, UNREACHABLE_TTL)
        return directory

    def ask(self, now: float) -> float:
        """Return when a question that is sent now is answered: the server takes one after the other."""
        begin = max(now, self.free_at)
        self.longest_wait = max(self.longest_wait, begin - now)
        self.free_at = begin + self._question
        self.questions[int(now * 10)] += 1
        return self.free_at

    async def beat(self) -> None:
        """Report as a node does in each heartbeat."""
        await self._first._membership.beat()

    async def read_members(self) -> None:
        """Read all members, as a node does after one has come or gone."""
        await self._first._membership._read_rows("")

    async def close(self) -> None:
        assert not self._first.is_blind, "the directory did not answer: the figures mean nothing"
        await self._first._server.close()


@dataclass(frozen=True)
class RolloutResult:
    """What a roll-out cost.

    Transfers are counted by their source. `deepest` is the largest depth of a transfer, `most_children` how many
    nodes got one blob from one node at a time; `refused` counts the requests to a node that fed as many as it may, and
    `most_waited` is how many seconds a node has looked for another one. `peak_rate` is in questions per second to the directory of a zone,
    within a tenth of a second, and `longest_wait` how many seconds one of them waited for others. `server_us` is the
    CPU time of the server for a question, in microseconds, `script_us` the part in the script; `beat_us` is for a
    heartbeat, `members_us` for reading the members of a zone.
    """

    nodes: int
    blobs: int
    image_bytes: int
    from_upstream: int
    upstream_bytes: int
    from_central: int
    from_peers: int
    deepest: int
    most_children: int
    refused: int
    most_waited: float
    median_seconds: float
    last_seconds: float
    questions: int
    peak_rate: float
    longest_wait: float
    server_us: float
    script_us: float
    tag_leaders: int
    beat_us: float = 0.0
    members_us: float = 0.0


class Rollout:
    """Runs one roll-out."""

    def __init__(self, world: RolloutWorld, redis: RedisServer) -> None:
        self.world = world
        self._redis = redis
        self._digests = [Digest.from_content(b"blob %d" % n) for n in range(len(world.sizes))]
        self._events: list[tuple[float, int, SimulatedNode, int]] = []
        self._numbers = count()
        self._turns = count()
        self._nodes: dict[str, SimulatedNode] = {}
        self._central: list[SimulatedNode] = []
        self._done_at: list[float] = []
        self._sources: Counter[str] = Counter()
        self._upstream_bytes = self._deepest = self._most_children = self._tag_leaders = 0
        self._refused = 0
        self._most_waited = 0.0

    async def run(self) -> RolloutResult:
        """Simulate it, and return what it cost."""
        world, random_times = self.world, random.Random(1)
        fleets = [SimulatedFleet(1 + n, world, self._redis) for n in range(world.zones)]
        central = SimulatedFleet(0, world, self._redis)
        self._central = await self._join(central, world.central, is_edge=False)
        for fleet in fleets:
            for node in await self._join(fleet, world.nodes // world.zones, is_edge=True):
                self._schedule(random_times.uniform(0, world.spread), node, -1)
        before = self._load()
        while self._events:
            now, _, node, blob = heapq.heappop(self._events)
            if blob < 0:
                await self._start(node, now)
            elif blob in node.searches:
                await self._search(node, blob, now)
            else:
                await self._finish(node, blob, now)
        after = self._load()
        # In this order: a beat forgets members that were silent for a minute.
        members_us = await self._measure(fleets[0].read_members)
        beat_us = await self._measure(fleets[0].beat)
        for fleet in (*fleets, central):
            await fleet.close()
        result = self._result([*fleets, central], before, after)
        return replace(result, beat_us=beat_us, members_us=members_us)

    async def _measure(self, ask: Callable[[], Awaitable[None]]) -> float:
        """Return the CPU time that the server needs for a question, in microseconds."""
        before = self._load()["cpu"]
        for _ in range(REPEATED):
            await ask()
        return round((self._load()["cpu"] - before) / REPEATED, 1)

    async def _join(
        self, fleet: SimulatedFleet, number: int, *, is_edge: bool
    ) -> list[SimulatedNode]:
        directories = await fleet.join(number)
        nodes = [
            SimulatedNode(fleet, fleet.address(index), directory, is_edge)
            for index, directory in enumerate(directories)
        ]
        self._nodes |= {node.address: node for node in nodes}
        return nodes

    def _schedule(self, at: float, node: SimulatedNode, blob: int) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), node, blob))

    async def _start(self, node: SimulatedNode, now: float) -> None:
        """Learn the tag, as a pull does first, and begin with as many blobs as a client does."""
        repository, tag = Repository(UPSTREAM, "library/app"), Tag("latest")
        known = await node.directory.get_tag(repository, tag)
        now = node.fleet.ask(now)
        if known is None or not known.is_fresh:
            self._tag_leaders += 1
            digest = self._digests[0]
            await node.directory.set_tag(repository, tag, digest, ttl=3600, keep=0)
        for _ in range(self.world.parallel):
            await self._begin_next(node, now)

    async def _begin_next(self, node: SimulatedNode, now: float) -> None:
        if node.begun < len(self.world.sizes):
            node.begun += 1
            await self._begin(node, node.begun - 1, now)

    async def _begin(self, node: SimulatedNode, blob: int, now: float) -> None:
        """Ask the directory where a blob is, and compute when it will be complete."""
        entered = node.directory.downloading(UPSTREAM, self._digests[blob])
        node.searches[blob] = SimulatedSearch(entered, await entered.__aenter__())
        await self._search(node, blob, now)

    async def _search(self, node: SimulatedNode, blob: int, now: float) -> None:
        """Ask a node for a blob; if it feeds as many as it may ask another one then, as `PeerRoute` does."""
        world, search = self.world, node.searches[blob]
        found = await search.download.locate(search.busy)
        now = node.fleet.ask(now) + world.hop
        parent = self._nodes[found.member.address] if found else None
        insists = search.since is not None and now - search.since > INSIST_AFTER
        is_busy = parent and (
            blob not in parent.blobs or (parent.feeding[blob] >= world.children and not insists)
        )
        if is_busy or (search.busy and not found):
            search.since = now if search.since is None else search.since
            self._refused += bool(is_busy)
            search.busy += [found.member] if found else []
            if not found or len(search.busy) == MAX_BUSY:
                search.busy.clear()
                now += WAIT_INTERVAL
            self._schedule(now, node, blob)
            return
        if search.since is not None:
            self._most_waited = max(self._most_waited, now - search.since)
        del node.searches[blob]
        await self._transfer_from(node, blob, now, search.entered, parent)

    async def _transfer_from(
        self,
        node: SimulatedNode,
        blob: int,
        now: float,
        entered: AbstractAsyncContextManager[FleetDownload],
        parent: SimulatedNode | None,
    ) -> None:
        """Begin a transfer from another node, or else from the central fleet or upstream."""
        world = self.world
        if parent:
            self._sources["peer" if node.is_edge else "central peer"] += 1
            shares = max(world.children * world.parallel, parent.feeding.total() + 1)
            node.blobs[blob] = self._transfer(parent, blob, world.link / shares, now, entered)
            self._most_children = max(self._most_children, parent.feeding[blob])
        elif node.is_edge:
            self._sources["central"] += 1
            parent = await self._ask_central(blob, now)
            rate = world.central_link / world.zones
            node.blobs[blob] = self._transfer(parent, blob, rate, now, entered)
        else:
            self._sources["upstream"] += 1
            self._upstream_bytes += world.sizes[blob]
            done_at = now + world.sizes[blob] / world.upstream_rate
            node.blobs[blob] = SimulatedTransfer(done_at, 1, entered)
        self._schedule(node.blobs[blob].done_at, node, blob)

    def _transfer(
        self,
        parent: SimulatedNode,
        blob: int,
        rate: float,
        now: float,
        entered: AbstractAsyncContextManager[FleetDownload],
    ) -> SimulatedTransfer:
        """Return a transfer from a node, which may still be receiving the blob itself."""
        source = parent.blobs[blob]
        own = now + self.world.sizes[blob] / rate
        depth = source.depth + 1 if source.done_at > now else 1
        self._deepest = max(self._deepest, depth)
        parent.feeding[blob] += 1
        return SimulatedTransfer(max(own, source.done_at + self.world.hop), depth, entered, parent)

    async def _ask_central(self, blob: int, now: float) -> SimulatedNode:
        """Return a central node, in turn, that has or fetches the blob."""
        while True:
            node = self._central[next(self._turns) % len(self._central)]
            if blob not in node.blobs and blob not in node.searches:
                await self._begin(node, blob, now)
            if blob in node.blobs:
                return node

    async def _finish(self, node: SimulatedNode, blob: int, now: float) -> None:
        transfer = node.blobs[blob]
        await transfer.entered.__aexit__(None, None, None)
        if transfer.source:
            transfer.source.feeding[blob] -= 1
        now = node.fleet.ask(now)
        node.stored += 1
        if node.is_edge:
            await self._begin_next(node, now)
            if node.stored == len(self.world.sizes):
                self._done_at.append(now)

    def _load(self) -> dict[str, float]:
        """Return the CPU time of the server and of its scripts so far, in microseconds, and their calls."""
        text = self._redis.command("INFO", "everything").decode()
        used = re.findall(r"used_cpu_(?:sys|user):([\d.]+)", text)
        calls = re.search(r"cmdstat_evalsha:calls=(\d+),usec=(\d+)", text)
        assert calls
        return {
            "cpu": sum(map(float, used)) * 1e6,
            "calls": float(calls[1]),
            "scripts": float(calls[2]),
        }

    def _result(
        self,
        fleets: Sequence[SimulatedFleet],
        before: dict[str, float],
        after: dict[str, float],
    ) -> RolloutResult:
        calls = after["calls"] - before["calls"]
        return RolloutResult(
            nodes=self.world.nodes,
            blobs=len(self.world.sizes),
            image_bytes=sum(self.world.sizes),
            from_upstream=self._sources["upstream"],
            upstream_bytes=self._upstream_bytes,
            from_central=self._sources["central"],
            from_peers=self._sources["peer"],
            deepest=self._deepest,
            most_children=self._most_children,
            refused=self._refused,
            most_waited=round(self._most_waited, 2),
            median_seconds=round(statistics.median(self._done_at), 1),
            last_seconds=round(max(self._done_at), 1),
            questions=int(calls),
            peak_rate=max(max(fleet.questions.values()) for fleet in fleets) * 10,
            longest_wait=round(max(fleet.longest_wait for fleet in fleets), 2),
            server_us=round((after["cpu"] - before["cpu"]) / calls, 1),
            script_us=round((after["scripts"] - before["scripts"]) / calls, 1),
            tag_leaders=self._tag_leaders,
        )


@asynccontextmanager
async def _running_server(directory: Path) -> AsyncIterator[RedisServer]:
    redis = RedisServer(directory)
    await asyncio.to_thread(redis.start)
    try:
        yield redis
    finally:
        await asyncio.to_thread(redis.close)


async def simulate(world: RolloutWorld, directory: Path) -> RolloutResult:
    """Simulate a roll-out with a server of its own."""
    async with _running_server(directory) as redis:
        return await Rollout(world, redis).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="fleet_rollout", description=(__doc__ or "")[:78])
    for name in ("nodes", "zones", "central", "children"):
        parser.add_argument(f"--{name}", type=int, default=getattr(RolloutWorld, name))
    for name in ("link", "spread", "question"):
        parser.add_argument(f"--{name}", type=float, default=getattr(RolloutWorld, name))
    options: dict[str, Any] = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(simulate(RolloutWorld(**options), Path(directory)))
    sys.stdout.write(json.dumps(msgspec.to_builtins(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
