"""Headers leave within fifteen seconds, whatever upstream does: clients give up after thirty."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from tests.fakes.content import Image, digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Answer, Program

LIMIT = 20.0  # 15, and a machine that is busy
PATIENT = {"connect_timeout": "10s", "stall_timeout": "30s", "attempts": 5}
NONE = digest_of(b"none")


async def timed(asking: Coroutine[Any, Any, Answer]) -> tuple[int, float]:
    start = time.monotonic()
    answer = await asking
    return answer.status, time.monotonic() - start


async def prepared(program: Program) -> Image:
    """Put things into the cache that upstream must be asked about again."""
    registry = program.registry
    image = registry.add_image("me/secret", layers=[b"secret"])
    registry.add_image("me/public")
    registry.add_image("me/stale")
    await program.pull(image)
    await program.manifest("me/stale")
    await program.settled()
    program.clock.turn(3600)
    registry.tokens.revoke()
    return image


def questions(program: Program, image: Image) -> dict[str, Coroutine[Any, Any, Answer]]:
    """Return everything that cannot be answered without upstream."""
    return {
        "a tag": program.manifest("me/public"),
        "the head of a tag": program.manifest("me/public", "other", method="HEAD"),
        "a stale tag": program.manifest("me/stale"),
        "a manifest": program.manifest("me/public", NONE),
        "a blob": program.blob(NONE, "me/public"),
        "the head of a blob": program.blob(NONE, "me/public", method="HEAD"),
        "tags": program.ask("/v2/me/public/tags/list"),
        "referrers": program.ask(f"/v2/me/public/referrers/{NONE}"),
        "a blob to be proven": program.blob(image.config, "me/public"),
        "a manifest to be proven": program.manifest("me/public", image.digest),
        "another repository": program.manifest("me/never"),
    }


async def test_u04_headers_leave_in_time_from_an_upstream_that_is_silent_and_from_one_that_drags(
    registry, make_program, tmp_path
):
    silent = await make_program(fetch=PATIENT)
    async with FakeRegistry() as other:
        dragging = Program(tmp_path / "dragging", other, fetch=PATIENT)
        await dragging.start()
        images = [await prepared(program) for program in (silent, dragging)]
        registry.fail("", Fault(until_headers=asyncio.Event()), times=None)
        async with asyncio.TaskGroup() as group:
            opener = group.create_task(_drag(other))
            asked = [
                (name, group.create_task(timed(asking)))
                for program, image in zip((silent, dragging), images, strict=True)
                for name, asking in questions(program, image).items()
            ]
            await asyncio.wait([task for _, task in asked])
            opener.cancel()
        await dragging.stop()
    for name, task in asked:
        status, seconds = task.result()
        assert seconds < LIMIT, name
        assert status in ({200} if name == "a stale tag" else {200, 404, 503, 504}), name


async def _drag(registry: FakeRegistry) -> None:
    """Answer every 7 s: a challenge, a token, redirects and answers are over 30 s together."""
    gate = asyncio.Event()
    while True:
        registry.heal()
        registry.fail("", Fault(until_headers=gate), times=None)
        await asyncio.sleep(7)
        opened, gate = gate, asyncio.Event()
        registry.heal()
        registry.fail("", Fault(until_headers=gate), times=None)
        opened.set()
