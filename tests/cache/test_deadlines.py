"""Response headers are sent within 15 s, whatever upstream does: clients give up after 30 s."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from tests.fakes.content import FakeImage, digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Answer, Program

# 15 s, and a reserve for a busy machine.
LIMIT = 20.0
DEFAULT_TIMEOUTS = {"connect_timeout": "10s", "stall_timeout": "30s", "attempts": 5}
ABSENT = digest_of(b"absent")


async def timed(request: Coroutine[Any, Any, Answer]) -> tuple[int, float]:
    """Return the status of the response, and the seconds that it took."""
    start = time.monotonic()
    answer = await request
    return answer.status, time.monotonic() - start


async def fill_cache(program: Program) -> FakeImage:
    """Cache content about which upstream must be asked again; return a private image."""
    registry = program.registry
    image = registry.add_image("me/secret", layers=[b"secret"])
    registry.add_image("me/public")
    registry.add_image("me/stale")
    await program.pull(image)
    await program.manifest("me/stale")
    await program.wait_for_downloads()
    program.clock.advance(3600)
    registry.tokens.revoke()
    return image


def upstream_requests(program: Program, image: FakeImage) -> dict[str, Coroutine[Any, Any, Answer]]:
    """Return by name one request of each kind that cannot be answered without upstream."""
    return {
        "a tag": program.manifest("me/public"),
        "the head of a tag": program.manifest("me/public", "other", method="HEAD"),
        "a stale tag": program.manifest("me/stale"),
        "a manifest": program.manifest("me/public", ABSENT),
        "a blob": program.blob(ABSENT, "me/public"),
        "the head of a blob": program.blob(ABSENT, "me/public", method="HEAD"),
        "tags": program.ask("/v2/me/public/tags/list"),
        "referrers": program.ask(f"/v2/me/public/referrers/{ABSENT}"),
        "a blob of another repository": program.blob(image.config, "me/public"),
        "a manifest of another repository": program.manifest("me/public", image.digest),
        "an unknown repository": program.manifest("me/never"),
    }


async def test_u04_headers_are_sent_in_time_if_upstream_is_silent_or_very_slow(
    registry, make_program, tmp_path
):
    silent = await make_program(fetch=DEFAULT_TIMEOUTS)
    async with FakeRegistry() as other:
        slow = Program(tmp_path / "slow", other, fetch=DEFAULT_TIMEOUTS)
        await slow.start()
        images = [await fill_cache(program) for program in (silent, slow)]
        registry.fail("", Fault(until_headers=asyncio.Event()), times=None)
        async with asyncio.TaskGroup() as group:
            delays = group.create_task(_delay_every_response(other))
            requests = [
                (name, group.create_task(timed(request)))
                for program, image in zip((silent, slow), images, strict=True)
                for name, request in upstream_requests(program, image).items()
            ]
            await asyncio.wait([task for _, task in requests])
            delays.cancel()
        await slow.stop()
    for name, task in requests:
        status, seconds = task.result()
        assert seconds < LIMIT, name
        assert status in ({200} if name == "a stale tag" else {200, 404, 503, 504}), name


async def _delay_every_response(registry: FakeRegistry) -> None:
    """Let upstream respond every 7 s: challenge, token, redirects and blob take over 30 s."""
    gate = asyncio.Event()
    while True:
        registry.heal()
        registry.fail("", Fault(until_headers=gate), times=None)
        await asyncio.sleep(7)
        opening, gate = gate, asyncio.Event()
        registry.heal()
        registry.fail("", Fault(until_headers=gate), times=None)
        opening.set()
