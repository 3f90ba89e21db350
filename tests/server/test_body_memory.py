"""Large bodies that slow clients do not take are bounded in memory."""

import asyncio
import json
import random

import pytest

from proxy.server import body_memory
from proxy.server.body_memory import MAX_BODIES_SIZE, MAX_BODIES_SIZE_PER_CLIENT, BodyMemory
from tests.fakes.content import OCI_MANIFEST
from tests.fakes.raw_client import RawClient
from tests.support.program import Program

MIB = 1 << 20
APP = "library/app"


def test_a_body_that_responses_share_counts_once():
    memory = BodyMemory()
    body, other = bytes(40 * MIB), bytes(30 * MIB)
    releases = [memory.hold("a", body) for _ in range(5)]
    assert None not in releases
    assert memory.hold("a", other) is None
    assert memory.hold("b", other) is not None
    for release in releases[:4]:
        assert release
        release()
    assert memory.hold("a", other) is None
    assert releases[4]
    releases[4]()
    assert memory.hold("a", other) is not None


def test_a_client_without_large_bodies_gets_one_whatever_others_hold():
    memory = BodyMemory()
    bodies = [bytes(MAX_BODIES_SIZE_PER_CLIENT) for _ in range(5)]
    held = [memory.hold(f"client{number}", body) for number, body in enumerate(bodies)]
    assert memory._size > MAX_BODIES_SIZE
    first, second = bytes(MIB), bytes(MIB)
    held.append(memory.hold("last", first))
    assert None not in held
    assert memory.hold("last", second) is None


def test_nothing_is_left_when_all_is_sent():
    rng, memory = random.Random(1), BodyMemory()
    bodies, held = [bytes(MIB * size) for size in (1, 20, 50)], []
    for _ in range(500):
        release = memory.hold(rng.choice("abc"), rng.choice(bodies))
        if release:
            held.append(release)
        if held and rng.random() < 0.6:
            held.pop(rng.randrange(len(held)))()
    for release in held:
        release()
    assert memory._size == 0
    assert [*memory._responses, *memory._clients, *memory._client_sizes] == []


@pytest.fixture
def manifests(registry) -> list[str]:
    """The digests of manifests of 4 MB."""
    return [
        registry.add_manifest(
            APP,
            f"v{number}",
            json.dumps({"x": str(number), "y": " " * 4_000_000}).encode(),
            OCI_MANIFEST,
        )
        for number in range(4)
    ]


async def request_slowly(program: Program, path: str) -> tuple[RawClient, int]:
    """Send a request, with a small buffer for its response; return the client and the status."""
    client = await RawClient.connect(program.url, receive_buffer=4096)
    client.send(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
    return client, int((await client.read(12))[9:])


async def test_m04_a_client_that_takes_no_bodies_gets_429_and_no_other_does(
    manifests, program, monkeypatch
):
    monkeypatch.setattr(body_memory, "MAX_BODIES_SIZE_PER_CLIENT", 10 * MIB)
    paths = [f"/v2/{APP}/manifests/{digest}" for digest in manifests]
    opened = [await request_slowly(program, path) for path in paths]
    assert [status for _, status in opened] == [200, 200, 429, 429]
    # The same manifest again takes no more memory.
    again, status = await request_slowly(program, paths[0])
    assert status == 200
    assert (await program.ask("/v2/")).status == 200
    for client in (opened[0][0], again):
        assert len((await client.read_response()).body) > 4_000_000
    async with asyncio.timeout(10):
        while (await program.ask(paths[2])).status != 200:
            pass
    for path in paths:
        assert (await program.ask(path)).status == 200
