"""Shutdown: no new connections, running requests are answered, and slow ones are cut."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.server import listening
from proxy.server.http import HttpServer
from tests.fakes.faults import Fault
from tests.support.program import Program

# Turns of the loop within which a shutdown without clients would be over.
TURNS = 50
LAYER = bytes(range(256)) * 8192


@asynccontextmanager
async def connected(program: Program) -> AsyncIterator["Line"]:
    """Open a connection without a request, and wait until it was accepted."""
    host, port = program.addresses[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    server = program.running.listener._server
    assert isinstance(server, HttpServer)
    async with asyncio.timeout(10):
        while writer.get_extra_info("sockname") not in {  # noqa: ASYNC110 - there is no event
            one.transport.get_extra_info("peername")
            for one in server._open_connections
            if one.transport
        }:
            await asyncio.sleep(0)
    try:
        yield Line(reader, writer)
    finally:
        writer.close()


class Line:
    """A connection whose bytes the test sends and reads."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str) -> str:
        """Send a request, and return the head of the response."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()


@asynccontextmanager
async def stopping(program: Program) -> AsyncIterator[asyncio.Task[None]]:
    """Begin the shutdown of the program, and wait until it only waits for clients.

    The shutdown must be over at the end of the block.
    """
    assert program._running is not None
    async with asyncio.TaskGroup() as group:
        task = group.create_task(program._running.aclose())
        async with asyncio.timeout(10):
            while os.path.exists(program.root / "admin.sock"):  # noqa: ASYNC110, ASYNC240, PTH110 - as cheap as it gets
                await asyncio.sleep(0)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        yield task
    program._running = None


async def test_p01_readiness_fails_at_once_and_health_stays(program):
    async with connected(program) as ready, connected(program) as healthy, stopping(program):
        answer = await ready.ask("/readyz")
        assert answer.startswith("HTTP/1.1 503 ")
        assert "Connection: close" in answer
        assert (await healthy.ask("/healthz")).startswith("HTTP/1.1 200 ")


async def test_p01_a_client_accepted_before_the_shutdown_is_answered(registry, program):
    image = registry.add_image()
    async with connected(program) as line, stopping(program):
        answer = await line.ask(f"/v2/{image.repository}/manifests/{image.tag}")
        assert answer.startswith("HTTP/1.1 200 ")
        assert "Connection: close" in answer


async def test_p01_new_connections_are_refused(registry, program):
    async with connected(program) as line:
        await line.ask("/v2/")
        async with stopping(program):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*program.addresses[0].split(":"))


async def test_p01_an_idle_connection_does_not_delay_the_shutdown(program):
    async with connected(program) as used, connected(program) as silent:
        await used.ask("/v2/")
        async with stopping(program) as task:
            async with asyncio.timeout(listening.IDLE_DRAIN_TIMEOUT + 5):
                await task
        await used.reader.read()
        assert await silent.reader.read() == b""


async def test_p01_a_running_request_is_answered_and_its_connection_closed(registry, program):
    release = asyncio.Event()
    image = registry.add_image()
    registry.fail("GET /v2/library/app/manifests", Fault(until_headers=release))
    async with connected(program) as line, asyncio.TaskGroup() as group:
        path = f"/v2/{image.repository}/manifests/{image.tag}"
        asking = group.create_task(line.ask(path))
        await registry.until(lambda: registry.count("GET /v2/library/app/manifests") == 1)
        async with stopping(program):
            release.set()
            assert (await asking).startswith("HTTP/1.1 200 ")
            assert b"schemaVersion" in await line.reader.read()


async def test_p01_a_response_that_takes_too_long_is_cut_and_resumed_after_the_restart(
    registry, make_program
):
    program = await make_program(server={"listen": ["127.0.0.1:0"], "shutdown_timeout": "100ms"})
    await cut_and_resumed(registry, program)


async def test_p02_a_second_signal_cuts_running_responses(registry, make_program):
    program = await make_program(server={"listen": ["127.0.0.1:0"], "shutdown_timeout": "1d"})
    await cut_and_resumed(registry, program, hurried=True)


async def cut_and_resumed(registry, program: Program, *, hurried: bool = False) -> None:
    image = registry.add_image(layers=[LAYER])
    (layer,) = image.layers
    await program.manifest(image)
    never = asyncio.Event()
    registry.fail(registry.body_of(layer), Fault(stall_at=len(LAYER) // 2, until=never))
    async with connected(program) as line:
        await line.ask(f"/v2/{image.repository}/blobs/{layer}")
        await line.reader.readexactly(len(LAYER) // 4)
        async with stopping(program) as task:
            if hurried:
                assert not task.done()
                program.running.skip_drain()
        assert len(await line.reader.read()) < len(LAYER) // 2, (
            "it ended early, and without a reset"
        )
    assert layer not in program.stored()
    never.set()
    registry.heal()
    sent = registry.bytes_sent(registry.body_of(layer))
    await program.start()
    answer = await program.blob(layer, image.repository)
    assert answer.digest == layer
    assert registry.bytes_sent(registry.body_of(layer)) - sent < len(LAYER)


async def test_a_client_that_disconnected_does_not_delay_the_shutdown(registry, program):
    async with connected(program) as line:
        await line.ask("/v2/")
    async with asyncio.timeout(5):
        await program.stop()
