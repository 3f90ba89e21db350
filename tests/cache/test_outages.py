"""An upstream that is down: what is cached is served, the rest fails fast and says why."""

import asyncio

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

HOUR = 3600


@pytest.fixture
async def broken(registry, program):
    """An image that is cached, its tag expired, and an upstream whose breaker is open."""
    image = registry.add_image(layers=[b"layer"])
    registry.add_image("library/other")
    await program.pull(image)
    await program.settled()
    program.clock.turn(HOUR)
    await registry.stop()
    while await program.metric("pullcache_upstream_up", upstream="docker.io"):
        assert (await program.manifest("library/other")).status == 503
    registry.requests.clear()
    return image


async def test_with_the_breaker_open_known_tags_and_digests_are_served(program, broken):
    await program.pull(broken)
    tag = await program.manifest(broken)
    assert "fwd=stale" in tag.headers["Cache-Status"]
    assert tag.headers["Warning"].startswith('299 - "stale: docker.io has been down since ')


async def test_with_the_breaker_open_what_is_not_cached_fails_at_once_and_says_since_when_and_why(
    registry, program, broken
):
    # Nothing listens: one that was asked would be missed, so what is silent now is the breaker.
    before = await program.metric("pullcache_upstream_requests_total")
    messages: list[str] = []
    while len(messages) < 5:
        manifest = await program.manifest("library/other")
        blob = await program.blob(digest_of(b"none"))
        assert (manifest.status, manifest.code) == (503, "UNAVAILABLE")
        assert int(manifest.headers["Retry-After"]) > 0
        assert (blob.status, blob.code) == (404, "BLOB_UNKNOWN")
        messages += [one.json["errors"][0]["message"] for one in (manifest, blob)]
    assert any(
        "has been down since " in message and "cannot be reached" in message for message in messages
    )
    # Probes aside, five clients and more cost nothing.
    assert await program.metric("pullcache_upstream_requests_total") - before <= 2


async def test_the_first_request_after_the_outage_that_gets_through_closes_the_breaker(
    registry, program, broken
):
    await registry.start()
    while (await program.manifest("library/other")).status == 503:
        pass
    assert await program.metric("pullcache_upstream_up", upstream="docker.io") == 1
    assert (await program.manifest("library/other")).status == 200
    assert "Warning" not in (await program.manifest(broken)).headers


async def test_the_daemon_starts_while_upstream_is_down(program, broken):
    await program.restart()
    await program.pull(broken)
    assert await program.metric("pullcache_upstream_up", upstream="docker.io") == 1


async def test_an_upstream_that_is_down_does_not_hold_up_another(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(upstreams={"other.test": {"url": other.url}})
        image = other.add_image("me/app")
        registry.fail("", Fault(until_headers=asyncio.Event()), times=None)
        async with asyncio.TaskGroup() as group:
            stuck = group.create_task(program.manifest("library/app"))
            await registry.until(lambda: bool(registry.requests))
            assert (await program.manifest("other.test/me/app")).digest == image.digest
            assert not stuck.done()
            stuck.cancel()


async def test_missing_content_and_refusals_do_not_open_the_breaker(registry, program):
    registry.add_image()
    for n in range(10):
        assert (await program.manifest("library/app", f"none{n}")).status == 404
        assert (await program.manifest(f"library/none{n}")).status == 404
    assert await program.metric("pullcache_upstream_up") == 1


async def test_a_cdn_that_fails_does_not_open_the_breaker_of_its_registry(registry, program):
    image = registry.add_image()
    await registry.edge.stop()
    for _ in range(3):
        assert (await program.blob(image.config)).status == 404
    assert await program.metric("pullcache_upstream_up") == 1
    assert (await program.manifest(image)).status == 200
    await registry.edge.start()
    assert (await program.blob(image.config)).status == 200


async def test_a_token_server_that_fails_in_passing_is_asked_again(registry, program):
    image = registry.add_image()
    registry.fail("/token", Fault(status=503), times=1)
    assert (await program.manifest(image)).status == 200
    assert registry.count("/token") == 2


async def test_the_retries_of_a_request_are_counted(registry, program):
    image = registry.add_image()
    registry.fail("/manifests/", Fault(status=502), times=1)
    assert (await program.manifest(image)).status == 200
    assert await program.metric("pullcache_upstream_retries_total", reason="request") == 1
