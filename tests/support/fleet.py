"""Nodes of one fleet in this process, and a relay between them that fails on demand."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from proxy.fleet.directory import Member
from tests.fakes.registry import FakeRegistry
from tests.fakes.startable import Startable
from tests.support.ports import reserve_port
from tests.support.program import Program
from tests.support.redis_server import RedisServer

TOKEN = "a secret of the fleet"
# Long enough that no test on a busy machine loses a node, a transfer or the directory, unless it wants to. Nodes
# report whenever a test waits.
TIMES = {"heartbeat": "10s", "stall_timeout": "20s", "answer_timeout": "20s"}
PATIENCE = 30.0


class FleetProgram(Program):
    """A node of the fleet whose directory is `valkey`. With a `relay`, the other nodes reach it only through that."""

    def __init__(
        self,
        root: Path,
        registry: FakeRegistry,
        valkey: RedisServer,
        *,
        relay: "PeerRelay | None" = None,
        scheme: str = "http",
        **sections: Any,
    ) -> None:
        port = reserve_port(self)
        root.mkdir(parents=True, exist_ok=True)
        token_file = root / "token"
        token_file.write_text(TOKEN)
        token_file.chmod(0o600)
        if relay:
            relay.port = port
        address = relay.url if relay else f"{scheme}://127.0.0.1:{port}"
        fleet = {
            "valkey": valkey.url,
            "address": address,
            "token_file": str(token_file),
            **TIMES,
            **sections.pop("fleet", {}),
        }
        listen = {"listen": [f"127.0.0.1:{port}"]}
        super().__init__(
            root / "store",
            registry,
            fleet=fleet,
            server={**listen, **sections.pop("server", {})},
            **sections,
        )

    @property
    def members(self) -> list[Member]:
        """The other nodes, as far as this one knows."""
        return [*self.running._core.directory.members]

    async def until(self, condition: Any) -> None:
        """Wait until a condition holds, while the node reports."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await self.report()
                await asyncio.sleep(0.01)

    async def report(self) -> None:
        """Report to the fleet now, and learn of the other nodes."""
        await self.running._core.directory.join()


async def start_all(*nodes: FleetProgram) -> None:
    """Start nodes, and wait until all of them know each other."""
    for node in nodes:
        await node.start()
        await node.until(lambda node=node: not node.running._core.directory.is_blind)
    for node in nodes:
        await node.until(lambda node=node: len(node.members) == len(nodes) - 1)


@asynccontextmanager
async def running_fleet(*nodes: FleetProgram) -> AsyncIterator[None]:
    """Run nodes that know each other, and stop those that run at the end."""
    try:
        await start_all(*nodes)
        yield
    finally:
        await stop_all(nodes)


async def stop_all(nodes: Iterable[FleetProgram]) -> None:
    """Stop the nodes that run, all of them also if one fails to stop."""
    async with AsyncExitStack() as stack:
        for node in nodes:
            if node.is_running:
                stack.push_async_callback(node.stop)


class PeerRelay(Startable):
    """Passes the requests of peers on to the node at `port`.

    Of a response that is longer than `flip_at` one bit is flipped there; at `cut_at` it ends, at `stall_at` it goes
    silent, and after `slow_at` single bytes arrive. Offsets count from the first byte of a connection's responses. `sent` counts bytes of responses.
    """

    def __init__(self) -> None:
        self.port = 0
        self.flip_at: int | None = None
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.slow_at: int | None = None
        self.sent = 0
        self.connections = 0
        self._listen_port = reserve_port(self)
        self._writers: set[asyncio.StreamWriter] = set()
        self._stopped = asyncio.Event()

    @property
    def url(self) -> str:
        """The address of the node for its peers."""
        return f"http://127.0.0.1:{self._listen_port}"

    async def start(self) -> None:
        """Listen."""
        self._stopped.clear()
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", self._listen_port)

    async def stop(self) -> None:
        """Close all connections, and refuse new ones."""
        self._stopped.set()
        self._server.close()
        for writer in [*self._writers]:
            writer.close()
        await self._server.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            node_reader, node_writer = await asyncio.open_connection("127.0.0.1", self.port)
            self._writers.add(node_writer)
            await asyncio.gather(
                self._pass_requests(reader, node_writer), self._pass_responses(node_reader, writer)
            )
            self._writers.discard(node_writer)
        except ConnectionError:
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _pass_responses(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        offset = 0
        with suppress(ConnectionError):
            while data := bytearray(await reader.read(1 << 16)):
                if self.flip_at is not None and offset <= self.flip_at < offset + len(data):
                    data[self.flip_at - offset] ^= 1
                if self.stall_at is not None and offset + len(data) > self.stall_at:
                    await self._stopped.wait()
                if self.slow_at is not None and offset + len(data) > self.slow_at:
                    await self._send_slowly(data, writer)
                if self.cut_at is not None and offset + len(data) > self.cut_at:
                    break
                offset += len(data)
                self.sent += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _send_slowly(self, data: bytearray, writer: asyncio.StreamWriter) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), 0.05)
