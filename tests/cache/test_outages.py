"""While upstream is down, cached content is served; the rest fails fast and says why."""

import asyncio
import json

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

HOUR = 3600


@pytest.fixture
async def cached(registry, program):
    """A cached image whose tag has expired, while upstream is down and its breaker is open."""
    image = registry.add_image(layers=[b"layer"])
    registry.add_image("library/other")
    await program.pull(image)
    await program.wait_for_downloads()
    program.clock.advance(HOUR)
    await registry.stop()
    while await program.metric("pullcache_upstream_up", upstream="docker.io"):
        assert (await program.manifest("library/other")).status == 503
    registry.requests.clear()
    return image


async def test_with_an_open_breaker_cached_tags_and_digests_are_served(program, cached):
    await program.pull(cached)
    tag = await program.manifest(cached)
    assert "fwd=stale" in tag.headers["Cache-Status"]
    assert tag.headers["Warning"].startswith('299 - "stale: docker.io has been down since ')


async def test_with_an_open_breaker_other_requests_fail_at_once_and_say_since_when_and_why(
    registry, program, cached
):
    # Upstream does not listen, so its own log cannot show requests; the metric does.
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
    # All of these cost nothing but the probes of the breaker.
    assert await program.metric("pullcache_upstream_requests_total") - before <= 2


async def test_the_status_line_of_a_manifest_says_why_because_clients_print_that(program, cached):
    for method in ("HEAD", "GET"):
        async with program.opened("/v2/library/other/manifests/latest", method) as response:
            assert response.status == 503
            assert response.reason.startswith("docker.io ")
            assert "cannot be reached: Connection refused" in response.reason
    async with program.opened(f"/v2/library/other/blobs/{digest_of(b'none')}", "GET") as response:
        assert (response.status, response.reason) == (404, "Not Found")


@pytest.mark.parametrize("status", [500, 502, 503, 400])
async def test_the_reason_in_a_status_line_is_short_and_printable(registry, program, status):
    hostile = "\r\nX: y\x1b[31m\u202e\xe9" + "x" * 5000
    document = json.dumps({"errors": [{"code": "UNKNOWN", "message": hostile}]})
    registry.fail("/manifests/", Fault(status=status, body=document.encode()), times=None)
    async with program.opened("/v2/library/other/manifests/latest", "GET") as response:
        assert response.status in (502, 503)
        assert 20 < len(response.reason) <= 200
        assert response.reason.isascii()
        assert response.reason.isprintable()
        assert "X" not in response.headers


async def test_the_first_successful_request_after_the_outage_closes_the_breaker(
    registry, program, cached
):
    await registry.start()
    while (await program.manifest("library/other")).status == 503:
        pass
    assert await program.metric("pullcache_upstream_up", upstream="docker.io") == 1
    assert (await program.manifest("library/other")).status == 200
    assert "Warning" not in (await program.manifest(cached)).headers


async def test_the_daemon_starts_while_upstream_is_down(program, cached):
    await program.restart()
    await program.pull(cached)
    assert await program.metric("pullcache_upstream_up", upstream="docker.io") == 1


async def test_a_silent_upstream_does_not_delay_another_one(registry, make_program):
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


async def test_missing_content_and_denied_repositories_do_not_open_the_breaker(registry, program):
    registry.add_image()
    for n in range(10):
        assert (await program.manifest("library/app", f"none{n}")).status == 404
        assert (await program.manifest(f"library/none{n}")).status == 404
    assert await program.metric("pullcache_upstream_up") == 1


async def test_a_failing_cdn_does_not_open_the_breaker_of_its_registry(registry, program):
    image = registry.add_image()
    await registry.edge.stop()
    for _ in range(3):
        assert (await program.blob(image.config)).status == 404
    assert await program.metric("pullcache_upstream_up") == 1
    assert (await program.manifest(image)).status == 200
    await registry.edge.start()
    assert (await program.blob(image.config)).status == 200


async def test_a_failed_token_request_is_retried(registry, program):
    image = registry.add_image()
    registry.fail("/token", Fault(status=503), times=1)
    assert (await program.manifest(image)).status == 200
    assert registry.count("/token") == 2


async def test_retries_are_counted(registry, program):
    image = registry.add_image()
    registry.fail("/manifests/", Fault(status=502), times=1)
    assert (await program.manifest(image)).status == 200
    assert await program.metric("pullcache_upstream_retries_total", reason="request") == 1
