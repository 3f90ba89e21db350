"""A real server, and the directories of the nodes of one fleet."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proxy.config import FleetSettings
from proxy.config.values import FleetName, OptionalUrl, PositiveDuration, ValkeyUrl
from proxy.fleet.directory import FleetDownload, PeerCopy
from proxy.fleet.valkey import ValkeyDirectory
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from tests.support.redis_server import MISSING, PROGRAM, RedisServer

HEARTBEAT = 0.1

# Conditions are looked at this often, in seconds.
POLL = 0.01


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a server that has no data."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.close()


class Nodes:
    """Nodes of one fleet, by number."""

    def __init__(self, server: RedisServer, stack: AsyncExitStack) -> None:
        self.server = server
        self._stack = stack
        self._starts = 0

    async def start(
        self,
        number: int,
        *,
        stored: Callable[[], list[Digest]] = list,
        version: str = "1",
        protocol: int | None = None,
        **settings: Any,
    ) -> ValkeyDirectory:
        """Start a node; it has left the fleet at the end of the test at the latest."""
        self._starts += 1
        values: dict[str, Any] = {
            "valkey": ValkeyUrl.parse(self.server.url),
            "name": FleetName("test"),
            "address": OptionalUrl(f"http://127.0.0.1:{number}"),
            "heartbeat": PositiveDuration(HEARTBEAT),
        }
        fleet = FleetSettings(**values | settings)
        digests = sorted(stored(), key=str)
        directory = ValkeyDirectory(
            fleet,
            Metrics([], version),
            instance=f"instance-{self._starts}",
            version=version,
            list_holdings=lambda after, count: [d for d in digests if str(d) > after][:count],
            protocol=protocol,
        )
        self._stack.push_async_callback(directory.close)
        await directory.join()
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        running = group.create_task(directory.run())
        self._stack.callback(running.cancel)
        return directory


@pytest.fixture
async def nodes(server: RedisServer) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as stack:
        yield Nodes(server, stack)


async def locate_until(
    download: FleetDownload,
    condition: Callable[[PeerCopy | None], bool] = lambda found: found is not None,
) -> Any:
    """Ask the directory until its answer is as the condition says."""
    found = await download.locate()
    while not condition(found):
        await asyncio.sleep(POLL)
        found = await download.locate()
    return found


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():  # noqa: ASYNC110 (a condition of another process does not signal)
        await asyncio.sleep(POLL)
