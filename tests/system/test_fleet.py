"""Several daemons as processes with a real directory: one is killed or frozen, or the directory is."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest

from tests.fakes.content import FakeImage
from tests.fakes.registry import FakeRegistry
from tests.support.redis_server import MISSING, PROGRAM, RedisServer
from tests.support.tasks import run_all
from tests.system.processes import isolated_environment
from tests.system.servers import Daemon

MIB = 1 << 20
IMAGE_SIZE = 36 * MIB
CLIENTS = 24
# On a busy machine none of these passes because a process gets no time.
TIMES = {
    "PULLCACHE_FLEET_HEARTBEAT": "5s",
    "PULLCACHE_FLEET_STALL_TIMEOUT": "20s",
    "PULLCACHE_FLEET_ANSWER_TIMEOUT": "20s",
}
# The defaults, for tests of nodes that are silent.
FAST = {"PULLCACHE_FLEET_HEARTBEAT": "2s", "PULLCACHE_FLEET_STALL_TIMEOUT": "4s"}

pytestmark = pytest.mark.system


class FleetDaemon(Daemon):
    """A node of a fleet as a process."""

    def __init__(
        self, directory: Path, upstream: str, server: RedisServer, env: Mapping[str, str]
    ) -> None:
        super().__init__(directory, upstream)
        directory.mkdir(parents=True, exist_ok=True)
        token_file = directory / "token"
        token_file.write_text("a secret of the fleet")
        token_file.chmod(0o600)
        self._env |= {
            "PULLCACHE_FLEET_VALKEY": server.url,
            "PULLCACHE_FLEET_ADDRESS": self.url,
            "PULLCACHE_FLEET_TOKEN_FILE": str(token_file),
            **TIMES,
            **env,
        }

    async def read_metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the series with these labels."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.partition("{")[0].partition(" ")[0] == name
            and all(f'{key}="{value}"' in line for key, value in labels.items())
        )


class FleetOfDaemons:
    """The nodes, their directory, and the upstream in this process."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.directory = directory
        self.stack = stack
        self.nodes: list[FleetDaemon] = []
        self.server = RedisServer(directory)

    async def start(self, count: int, env: Mapping[str, str] = MappingProxyType({})) -> None:
        self.registry = await self.stack.enter_async_context(FakeRegistry())
        await asyncio.to_thread(self.server.start)
        self.stack.callback(self.server.close)
        for number in range(count):
            directory = self.directory / f"node{number}"
            node = FleetDaemon(directory, self.registry.url, self.server, env)
            self.nodes.append(node)
            self.stack.callback(self._end, node)
        await run_all(asyncio.to_thread(node.start) for node in self.nodes)
        for node in self.nodes:
            await until_metric(node, "pullcache_fleet_members", count)

    def _end(self, node: FleetDaemon) -> None:
        if node._process and node._process.is_running():
            node._process.signal(signal.SIGCONT)
            node._process.kill()

    @property
    def blob_bytes(self) -> int:
        """The bytes of blobs that upstream has sent."""
        return self.registry.bytes_sent("GET /registry-v2")

    @property
    def manifest_gets(self) -> int:
        """The manifests that upstream has sent."""
        asked = self.registry.seen("GET /v2/.*/manifests/.*")
        return sum(request.status == 200 for request in asked)

    def add_image(self, tag: str = "latest", size: int = IMAGE_SIZE) -> FakeImage:
        layers = [os.urandom(size // 4) for _ in range(4)]
        return self.registry.add_image(tag=tag, layers=layers, index=True)


async def until_metric(node: FleetDaemon, name: str, value: float, **labels: str) -> None:
    """Wait until a metric has reached a value."""
    async with asyncio.timeout(20):
        while await node.read_metric(name, **labels) < value:  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.05)


@pytest.fixture
async def fleet(directory: Path) -> AsyncIterator[FleetOfDaemons]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    async with AsyncExitStack() as stack:
        yield FleetOfDaemons(directory, stack)


async def fetch(session: aiohttp.ClientSession, url: str) -> str:
    """Return the digest of a response's body."""
    hasher = sha256()
    async with session.get(url) as response:
        assert response.status == 200, (url, response.status, await response.text())
        async for chunk in response.content.iter_any():
            hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


async def pull(node: FleetDaemon, image: FakeImage) -> None:
    """Pull an image as a client that does not resume, and check all of it."""
    headers = {"Accept": "*/*"}
    base = f"{node.url}/v2/{image.repository}"
    timeout = aiohttp.ClientTimeout(total=50)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        assert await fetch(session, f"{base}/manifests/{image.tag}") == image.digest
        assert await fetch(session, f"{base}/manifests/{image.manifest}") == image.manifest
        blobs = [*dict.fromkeys(image.blobs)]
        digests = await run_all(fetch(session, f"{base}/blobs/{one}") for one in blobs)
        assert digests == blobs


async def copy_with_skopeo(node: FleetDaemon, image: FakeImage, target: Path) -> int:
    """Copy an image with skopeo, which does not resume; return its exit code."""
    process = await asyncio.create_subprocess_exec(
        *("skopeo", "--override-arch", "amd64", "copy", "--quiet", "--src-tls-verify=false"),
        f"docker://{node.address}/{image.repository}:{image.tag}",
        f"dir:{target}",
        env=isolated_environment(),
    )
    return await process.wait()


async def until_sending(fleet: FleetOfDaemons, size: int) -> None:
    """Wait until upstream has sent some bytes of blobs."""
    await fleet.registry.until(lambda: fleet.blob_bytes >= size)


@pytest.mark.parametrize(("clients", "size"), [(CLIENTS, IMAGE_SIZE), (300, 4 * MIB)])
async def test_many_clients_of_3_nodes_cost_one_transfer(fleet, clients, size):
    await fleet.start(3)
    image = fleet.add_image(size=size)
    await run_all(pull(fleet.nodes[n % 3], image) for n in range(clients))
    size = sum(len(fleet.registry.repositories[image.repository].blobs[b]) for b in image.blobs)
    assert size <= fleet.blob_bytes <= size + 2 * len(image.blobs)
    assert fleet.manifest_gets == 2


async def test_the_fleet_asks_upstream_for_a_tag_once_a_ttl(fleet):
    await fleet.start(3, {"PULLCACHE_MANIFESTS_TAG_TTL": "*=1s"})
    image = fleet.add_image(size=4096)
    asked = f"(HEAD|GET) /v2/.*/manifests/{image.tag}"
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with (
        asyncio.timeout(50),
        aiohttp.ClientSession(headers={"Accept": "*/*"}) as session,
    ):
        while (count := fleet.registry.count(asked)) < 6:
            for node in fleet.nodes:
                url = f"{node.url}/v2/{image.repository}/manifests/{image.tag}"
                assert await fetch(session, url) == image.digest
            await asyncio.sleep(0.01)
    # At the beginning one more is a GET. Each node by itself would ask as often.
    assert count <= loop.time() - started + 2


async def test_no_node_feeds_more_than_its_children(fleet):
    children = 2
    await fleet.start(8, {"PULLCACHE_FLEET_CHILDREN": str(children)})
    fleet.registry.throttle(4 * MIB)
    sizes = [1 << 17, 1 << 18, MIB, 2 * MIB, 8 * MIB]
    digests = [fleet.registry.add_blob(os.urandom(size)) for size in sizes]

    async def pull_all(node: FleetDaemon, number: int) -> None:
        async with aiohttp.ClientSession() as session:
            for digest in digests[number % 5 :] + digests[: number % 5]:
                url = f"{node.url}/v2/library/app/blobs/{digest}"
                assert await fetch(session, url) == digest

    await run_all(pull_all(node, number) for number, node in enumerate(fleet.nodes))
    assert fleet.blob_bytes <= sum(sizes) + 7 * len(sizes)
    for node in fleet.nodes:
        await until_logged(node, "peer_request", "out")
        lines = [json.loads(line) for line in node.log.splitlines() if line.startswith("{")]
        # A node that has waited for five seconds is sent a blob all the same, on a busy machine.
        exceeded = sum(line["event"] == "peer_limit_exceeded" for line in lines)
        for digest in digests:
            sent = [
                line for line in lines if line["event"] == "peer_request" and digest in line["path"]
            ]
            assert most_at_a_time(sent) <= children + exceeded


async def until_logged(node: FleetDaemon, event: str, direction: str) -> None:
    """Wait until the log has the lines of all bytes that other nodes were sent."""
    async with asyncio.timeout(20):
        while True:
            lines = [json.loads(line) for line in node.log.splitlines() if line.startswith("{")]
            logged = sum(line["bytes"] for line in lines if line["event"] == event)
            if logged == await node.read_metric("pullcache_peer_bytes_total", direction=direction):
                return
            await asyncio.sleep(0.05)


def most_at_a_time(lines: list[Any]) -> int:
    """Return how many transfers of these log lines ran at the same time."""
    events: list[tuple[float, int]] = []
    for line in lines:
        if line["status"] in (200, 206):
            end = datetime.fromisoformat(line["time"]).timestamp()
            # The clock of the line is read after the transfer has ended, by a little.
            events += [(end - line["seconds"], 1), (end, -1)]
    return max(accumulate(change for _, change in sorted(events)), default=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_clients_of_the_other_nodes_outlive_the_node_that_fetches(fleet, number):
    await fleet.start(3, FAST if number == signal.SIGSTOP else {})
    image = fleet.add_image()
    fleet.registry.throttle(4 * MIB)
    has_skopeo = shutil.which("skopeo") is not None
    others = fleet.nodes[1:]
    async with failing(pull(fleet.nodes[0], image)):
        await until_sending(fleet, 2 * MIB)
        async with asyncio.TaskGroup() as group:
            for n in range(12):
                group.create_task(pull(others[n % 2], image))
            copies = [
                group.create_task(copy_with_skopeo(node, image, fleet.directory / f"copy{n}"))
                for n, node in enumerate(others)
                if has_skopeo
            ]
            # Both nodes are in the middle of transfers from the first one.
            for node in others:
                await until_metric(node, "pullcache_peer_bytes_total", MIB, direction="in")
            fleet.nodes[0].process.signal(number)
            fleet.registry.throttle(None)
    size = sum(len(fleet.registry.repositories[image.repository].blobs[b]) for b in image.blobs)
    assert [copy.result() for copy in copies] == [0] * len(copies)
    if number == signal.SIGKILL:
        assert fleet.blob_bytes <= size + MIB


@asynccontextmanager
async def failing(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine that may fail, and end it after the block."""
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_pulls_go_on_without_the_directory_and_share_again_after_its_return(fleet):
    await fleet.start(3)
    first, second, third = (fleet.add_image(tag, 8 * MIB) for tag in ("one", "two", "three"))
    fleet.registry.throttle(4 * MIB)
    async with asyncio.TaskGroup() as group:
        for node in fleet.nodes:
            group.create_task(pull(node, first))
        await until_sending(fleet, MIB)
        fleet.server.kill()
    fleet.registry.throttle(None)
    await run_all(pull(node, second) for node in fleet.nodes)
    await asyncio.to_thread(fleet.server.start)
    for node in fleet.nodes:
        await until_metric(node, "pullcache_fleet_up", 1)
        await until_metric(node, "pullcache_fleet_members", 3)
    before = fleet.blob_bytes
    await run_all(pull(node, third) for node in fleet.nodes)
    size = sum(len(fleet.registry.repositories[third.repository].blobs[b]) for b in third.blobs)
    assert fleet.blob_bytes - before <= size + 2 * len(third.blobs)


async def test_nodes_are_restarted_one_after_another_under_load(fleet):
    await fleet.start(3)
    images = [fleet.add_image(f"v{n}", 4 * MIB) for n in range(6)]
    is_over = False

    async def load(client: int) -> None:
        """Pull one image after another, from the next node if one does not answer."""
        pulled = 0
        while not is_over:
            image = images[(pulled + client) % len(images)]
            await pull_resuming(fleet.nodes, image, client)
            pulled += 1

    async with asyncio.TaskGroup() as group:
        for client in range(4):
            group.create_task(load(client))
        for node in fleet.nodes:
            await asyncio.to_thread(node.stop)
            await asyncio.to_thread(node.start)
        is_over = True


async def pull_resuming(nodes: list[FleetDaemon], image: FakeImage, client: int) -> None:
    """Pull an image, and continue at the next node where one breaks off."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=50)) as session:
        for path, digest in [
            (f"manifests/{image.tag}", image.digest),
            (f"manifests/{image.manifest}", image.manifest),
            *((f"blobs/{blob}", blob) for blob in dict.fromkeys(image.blobs)),
        ]:
            content = bytearray()
            async with asyncio.timeout(40):
                for attempt in range(client, 1000):
                    node = nodes[attempt % len(nodes)]
                    url = f"{node.url}/v2/{image.repository}/{path}"
                    if await receive(session, url, content):
                        break
                    await asyncio.sleep(0.05)
            assert f"sha256:{sha256(content).hexdigest()}" == digest


async def receive(session: aiohttp.ClientSession, url: str, content: bytearray) -> bool:
    """Append the rest of a response; return whether it is complete."""
    headers = {"Accept": "*/*"} | ({"Range": f"bytes={len(content)}-"} if content else {})
    try:
        async with session.get(url, headers=headers) as response:
            if response.status not in (200, 206):
                return False
            if response.status == 200:
                content.clear()
            async for chunk in response.content.iter_any():
                content += chunk
    except (aiohttp.ClientError, ConnectionError):
        return False
    return True
