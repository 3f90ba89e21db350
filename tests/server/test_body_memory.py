"""Large bodies that slow clients do not take are bounded in memory."""

import json
import random
from contextlib import AsyncExitStack

import pytest

from proxy.server import body_memory
from proxy.server.body_memory import MAX_BODIES_SIZE, MAX_BODIES_SIZE_PER_CLIENT, BodyMemory
from tests.fakes.content import OCI_MANIFEST

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


async def test_m04_a_client_that_takes_no_bodies_gets_429_and_no_other_does(
    manifests, program, monkeypatch
):
    monkeypatch.setattr(body_memory, "MAX_BODIES_SIZE_PER_CLIENT", 10 * MIB)
    paths = [f"/v2/{APP}/manifests/{digest}" for digest in manifests]
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(program.opened(path)) for path in paths]
        assert [response.status for response in opened] == [200, 200, 429, 429]
        # The same manifest again takes no more memory.
        again = await stack.enter_async_context(program.opened(paths[0]))
        assert again.status == 200
        assert (await program.ask("/v2/")).status == 200
        assert len(await opened[0].read()) > 4_000_000
        assert len(await again.read()) > 4_000_000
        while (await program.ask(paths[2])).status != 200:
            pass
    for path in paths:
        assert (await program.ask(path)).status == 200
