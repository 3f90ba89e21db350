"""A real server, and the directories of the nodes of one fleet."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proxy.config import FleetSettings
from proxy.config.values import FleetName, OptionalUrl, PositiveDuration, ValkeyUrl
from proxy.fleet.directory import Directory, FleetDownload, PeerCopy
from proxy.fleet.valkey import ValkeyDirectory
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from tests.support.redis_server import MISSING, PROGRAM, RedisServer

# A node is silent after three heartbeats, and the server is given up after the answer timeout: on a busy machine
# neither may happen, unless a test is about it. Nodes report whenever a test waits for a condition.
HEARTBEAT = 10.0
ANSWER_TIMEOUT = 20.0

# Conditions are looked at this often, in seconds, for this long.
POLL = 0.01
PATIENCE = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a server that has no data."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    server = RedisServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.close()


class Nodes:
    """Nodes of one fleet, by number."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self.started: list[ValkeyDirectory] = []
        self._stack = stack

    async def start(
        self,
        number: int,
        *,
        stored: Callable[[], list[Digest]] = list,
        version: str = "1",
        protocol: int | None = None,
        ca: str = "",
        **settings: Any,
    ) -> ValkeyDirectory:
        """Start a node; it has left the fleet at the end of the test at the latest."""
        values: dict[str, Any] = {
            "valkey": ValkeyUrl.parse(self.server.url),
            "name": FleetName("test"),
            "address": OptionalUrl(f"http://127.0.0.1:{number}"),
            "heartbeat": PositiveDuration(HEARTBEAT),
            "answer_timeout": PositiveDuration(ANSWER_TIMEOUT),
        }
        fleet = FleetSettings(**values | settings)
        digests = sorted(stored(), key=str)
        directory = ValkeyDirectory(
            fleet,
            Metrics([], version),
            instance=f"instance-{len(self.started)}",
            version=version,
            list_holdings=lambda after, count: [d for d in digests if str(d) > after][:count],
            protocol=protocol,
            ca=ca,
        )
        self.started.append(directory)
        self._stack.push_async_callback(directory.close)
        await directory.join()
        running = asyncio.get_running_loop().create_task(directory.run())
        self._stack.push_async_callback(_end, running)
        return directory

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, while all nodes report."""
        await wait_until(condition, *self.started)


async def _end(running: "asyncio.Task[None]") -> None:
    """Cancel a task. A task group would wait for one that does not end."""
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=PATIENCE)
    assert done, f"a cancelled task goes on: {running}"


@pytest.fixture
async def nodes(server: RedisServer) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        yield Nodes(server, stack)


async def locate_until(
    download: FleetDownload,
    condition: Callable[[PeerCopy | None], bool] = lambda found: found is not None,
) -> Any:
    """Ask the directory until its answer is as the condition says."""
    async with asyncio.timeout(PATIENCE):
        found = await download.locate()
        while not condition(found):
            await asyncio.sleep(POLL)
            found = await download.locate()
        return found


async def wait_until(condition: Callable[[], bool], *reporting: Directory) -> None:
    """Wait until a condition holds, while nodes report to the directory."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            for directory in reporting:
                await directory.join()
            await asyncio.sleep(POLL)
