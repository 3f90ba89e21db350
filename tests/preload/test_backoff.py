"""A preload that upstream holds up waits, says until when, and goes on."""

from proxy.preload.backoff import OUTAGE_TIMEOUT, RATE_LIMIT_TIMEOUT
from tests.fakes.faults import Fault
from tests.fakes.gallery import push_index, push_manifest
from tests.fakes.registry import FakeRegistry
from tests.support.admin_api import APP, BASE, NATIVE, OWN, checks
from tests.support.preload_api import preloading

PULLS = "^GET .*/manifests/"


def push(registry, tag: str = "v1") -> dict[str, str]:
    made = {NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE)}
    return made | {"index": push_index(registry, APP, tag, made)}


async def to_the_end(program, run, seconds: float) -> None:
    """Let so much time pass at each wait."""
    while not run.of("totals"):
        if run.events[-1]["event"] == "waiting":
            program.clock.turn(seconds)
        await run.next()


async def complete(program) -> bool:
    return all(check["state"] == "complete" for check in await checks(program, "app:v1"))


async def test_a_429_is_waited_out_as_long_as_upstream_says(registry, program):
    push(registry)
    rule = registry.fail(PULLS, Fault(status=429, headers={"Retry-After": "600"}), times=None)
    async with preloading(program, "app:v1") as run:
        waiting = await run.until("waiting")
        assert waiting["upstream"] == "docker.io"
        assert 590 < waiting["until"] - program.clock() <= 601
        assert "rate limit exceeded" in waiting["reason"]
        rule.times = 0
        program.clock.turn(602)
        await run.until("totals")
    assert len(run.of("resumed")) == 1
    assert run.of("done")
    assert await complete(program)


async def test_the_last_pulls_of_a_limit_are_left_to_clients(registry, program):
    push(registry)
    registry.pulls = 95
    async with preloading(program, "app:v1") as run:
        waiting = await run.until("waiting")
        # The index was pulled when nobody knew yet; of its manifest nothing was asked but how many are left.
        assert registry.pulls == 96
        assert (
            waiting["reason"] == "docker.io allows 4 more of 100 pulls, which are left to clients"
        )
        assert waiting["until"] == program.clock() + 900
        program.clock.turn(901)
        await run.until("waiting")
        assert registry.pulls == 96
        registry.pulls = 10
        program.clock.turn(901)
        await run.until("totals")
    assert run.of("done")
    assert registry.pulls == 11


async def test_a_layer_s_429_is_waited_out_too(registry, program):
    push(registry)
    rule = registry.fail("GET /v2/.*/blobs/", Fault(status=429), times=None)
    async with preloading(program, "app:v1") as run:
        await run.until("waiting")
        rule.times = 0
        await to_the_end(program, run, 61)
    assert await complete(program)


async def test_other_upstreams_are_not_held_up(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(upstreams={"ghcr.io": {"url": other.url}})
        push(registry)
        push_manifest(other, "me/app", [BASE], tag="v1", platform=NATIVE)
        registry.fail(PULLS, Fault(status=429), times=None)
        async with preloading(program, "app:v1", "ghcr.io/me/app:v1") as run:
            done = await run.until("done")
            assert done["image"] == "ghcr.io/me/app:v1"
            assert not run.of("failed")


async def test_what_is_here_needs_no_pull_and_does_not_wait(registry, program):
    push(registry)
    async with preloading(program, "app:v1") as run:
        await run.until("totals")
    registry.pulls = 100
    async with preloading(program, "app:v1") as run:
        await run.until("totals")
    assert run.of("done")[0]["outcome"] == "up_to_date"


async def test_a_limit_that_does_not_end_is_a_failure_at_last(registry, program):
    push(registry)
    registry.fail(PULLS, Fault(status=429), times=None)
    async with preloading(program, "app:v1") as run:
        await run.until("waiting")
        program.clock.turn(RATE_LIMIT_TIMEOUT + 1)
        failed = await run.until("failed")
    assert failed["code"] == "rate_limited"


async def test_an_outage_is_waited_out_for_a_while(registry, program):
    push(registry)
    registry.fail("/v2/library/app", Fault(status=503), times=None)
    async with preloading(program, "app:v1") as run:
        await run.until("waiting")
        registry.heal()
        await to_the_end(program, run, 10)
    assert run.of("done")


async def test_an_outage_that_lasts_is_a_failure(registry, program):
    push(registry)
    registry.fail("/v2/library/app", Fault(status=503), times=None)
    async with preloading(program, "app:v1") as run:
        await run.until("waiting")
        program.clock.turn(OUTAGE_TIMEOUT + 1)
        failed = await run.until("failed")
    assert failed["code"] in ("upstream_unavailable", "upstream_down")


async def test_offline_nobody_is_waited_for(registry, make_program):
    program = await make_program(offline=True)
    async with preloading(program, "app:v1") as run:
        failed = await run.until("failed")
    assert failed["code"] == "offline"
    assert registry.requests == []
