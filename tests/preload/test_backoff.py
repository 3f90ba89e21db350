"""A preload waits for a rate limit or an outage, reports until when, and continues."""

from proxy.preload.backoff import OUTAGE_TIMEOUT, RATE_LIMIT_TIMEOUT
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.fakes.registry import FakeRegistry
from tests.preload.images import push_app
from tests.support.admin_api import BASE, NATIVE, check_images
from tests.support.preload_api import start_preload

PULLS = "^GET .*/manifests/"


async def run_to_end(program, run, seconds: float) -> None:
    """Read all events, and let this much time pass at each wait."""
    while not run.events_of("totals"):
        if run.events[-1]["event"] == "waiting":
            program.clock.advance(seconds)
        await run.next_event()


async def is_complete(program) -> bool:
    return all(check["state"] == "complete" for check in await check_images(program, "app:v1"))


async def test_a_429_is_waited_out_until_retry_after(registry, program):
    push_app(registry)
    rule = registry.fail(PULLS, Fault(status=429, headers={"Retry-After": "600"}), times=None)
    async with start_preload(program, "app:v1") as run:
        waiting = await run.wait_for("waiting")
        assert waiting["upstream"] == "docker.io"
        assert 590 < waiting["until"] - program.clock() <= 601
        assert "rate limit exceeded" in waiting["reason"]
        rule.times = 0
        program.clock.advance(602)
        await run.wait_for("totals")
    assert len(run.events_of("resumed")) == 1
    assert run.events_of("done")
    assert await is_complete(program)


async def test_the_last_pulls_of_a_quota_are_left_to_clients(registry, program):
    push_app(registry)
    registry.pulls = 95
    async with start_preload(program, "app:v1") as run:
        waiting = await run.wait_for("waiting")
        # The index was pulled before the quota was known; for its manifest, only a HEAD was sent.
        assert registry.pulls == 96
        assert waiting["reason"] == "docker.io allows 4 more of 100 pulls, reserved for clients"
        assert waiting["until"] == program.clock() + 900
        program.clock.advance(901)
        await run.wait_for("waiting")
        assert registry.pulls == 96
        registry.pulls = 10
        program.clock.advance(901)
        await run.wait_for("totals")
    assert run.events_of("done")
    assert registry.pulls == 11


async def test_a_429_for_a_layer_is_waited_out(registry, program):
    push_app(registry)
    rule = registry.fail("GET /v2/.*/blobs/", Fault(status=429), times=None)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("waiting")
        rule.times = 0
        await run_to_end(program, run, 61)
    assert await is_complete(program)


async def test_other_upstreams_do_not_wait(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(upstreams={"ghcr.io": {"url": other.url}})
        push_app(registry)
        push_manifest(other, "me/app", [BASE], tag="v1", platform=NATIVE)
        registry.fail(PULLS, Fault(status=429), times=None)
        async with start_preload(program, "app:v1", "ghcr.io/me/app:v1") as run:
            done = await run.wait_for("done")
            assert done["image"] == "ghcr.io/me/app:v1"
            assert not run.events_of("failed")


async def test_a_stored_image_needs_no_pull_and_does_not_wait(registry, program):
    push_app(registry)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("totals")
    registry.pulls = 100
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("totals")
    assert run.events_of("done")[0]["outcome"] == "up_to_date"


async def test_a_rate_limit_that_lasts_longer_than_the_timeout_fails_the_image(registry, program):
    push_app(registry)
    registry.fail(PULLS, Fault(status=429), times=None)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("waiting")
        program.clock.advance(RATE_LIMIT_TIMEOUT + 1)
        failed = await run.wait_for("failed")
    assert failed["code"] == "rate_limited"


async def test_a_short_outage_is_waited_out(registry, program):
    push_app(registry)
    registry.fail("/v2/library/app", Fault(status=503), times=None)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("waiting")
        registry.heal()
        await run_to_end(program, run, 10)
    assert run.events_of("done")


async def test_an_outage_that_lasts_longer_than_the_timeout_fails_the_image(registry, program):
    push_app(registry)
    registry.fail("/v2/library/app", Fault(status=503), times=None)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("waiting")
        program.clock.advance(OUTAGE_TIMEOUT + 1)
        failed = await run.wait_for("failed")
    assert failed["code"] in ("upstream_unavailable", "upstream_down")


async def test_an_offline_cache_fails_at_once(registry, make_program):
    program = await make_program(offline=True)
    async with start_preload(program, "app:v1") as run:
        failed = await run.wait_for("failed")
    assert failed["code"] == "offline"
    assert registry.requests == []
