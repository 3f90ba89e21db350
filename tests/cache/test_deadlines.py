"""Headers leave within thirty seconds, whatever upstream does: clients give up after that."""

import asyncio
import time

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault

LIMIT = 29.0


@pytest.fixture
async def stuck(registry, make_program):
    """A program with production's patience, and an upstream that never answers."""
    program = await make_program(
        fetch={"connect_timeout": "10s", "stall_timeout": "30s", "attempts": 5}
    )
    image = registry.add_image("me/secret", layers=[b"secret"])
    registry.add_image("me/public")
    registry.add_image("me/stale")
    await program.pull(image)
    await program.manifest("me/stale")
    await program.settled()
    program.clock.turn(3600)
    registry.tokens.revoke()
    return program, image


async def timed(asking) -> tuple[int, float]:
    start = time.monotonic()
    answer = await asking
    return answer.status, time.monotonic() - start


async def test_headers_leave_in_time_when_upstream_never_answers(registry, stuck):
    program, image = stuck
    registry.fail("", Fault(until_headers=asyncio.Event()), times=None)
    digest = digest_of(b"none")
    asked = {
        "a tag": program.manifest("me/public"),
        "the head of a tag": program.manifest("me/public", "other", method="HEAD"),
        "a stale tag": program.manifest("me/stale"),
        "a manifest": program.manifest("me/public", digest),
        "a blob": program.blob(digest, "me/public"),
        "the head of a blob": program.blob(digest, "me/public", method="HEAD"),
        "tags": program.ask("/v2/me/public/tags/list"),
        "referrers": program.ask(f"/v2/me/public/referrers/{digest}"),
        "a blob to be proven": program.blob(image.config, "me/public"),
        "a manifest to be proven": program.manifest("me/public", image.digest),
        "another repository": program.manifest("me/never"),
    }
    results = dict(zip(asked, await asyncio.gather(*map(timed, asked.values())), strict=True))
    assert results["a stale tag"][0] == 200
    for name, (status, seconds) in results.items():
        assert seconds < LIMIT, name
        assert status in {200, 404, 503, 504}, name


async def test_headers_leave_in_time_when_each_answer_takes_almost_too_long(registry, stuck):
    """A challenge, a token and an answer after 12 s each are 36 s together."""
    program, image = stuck
    later = [asyncio.Event() for _ in range(4)]
    registry.heal()
    for match in ("/v2/me/public", "/token", "/v2/me/public", "/registry-v2/"):
        registry.fail(match, Fault(until_headers=later[0]), times=None)

    async def tick() -> None:
        while True:
            await asyncio.sleep(12)
            later[0].set()
            await asyncio.sleep(0)
            later[0].clear()

    asked = {
        "tags": program.ask("/v2/me/public/tags/list"),
        "the head of a blob": program.blob(digest_of(b"x"), "me/public", method="HEAD"),
        "a blob to be proven": program.blob(image.config, "me/public"),
    }
    async with asyncio.TaskGroup() as group:
        clock = group.create_task(tick())
        results = await asyncio.gather(*map(timed, asked.values()))
        clock.cancel()
    for name, (_, seconds) in zip(asked, results, strict=True):
        assert seconds < LIMIT, name
