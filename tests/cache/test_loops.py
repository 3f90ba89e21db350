"""Caches that name each other as upstream or mirror: a request that comes back is refused at once."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from proxy.hops import MAX_HOPS
from tests.fakes.content import digest_of
from tests.support.program import Program

ABSENT = digest_of(b"absent")
OWN = "1.1 pullcache-"

Make = Callable[..., Awaitable[Program]]


async def chain(make_program: Make, tmp_path: Path, count: int) -> list[Program]:
    """Start caches of which each has the next one as its mirror, and the last one the first."""
    caches = [await make_program(tmp_path / f"store{n}") for n in range(count)]
    for cache, following in zip(caches, [*caches[1:], caches[0]], strict=True):
        settings = {"url": cache.registry.url, "mirrors": [following.url]}
        assert await cache.reload(upstreams={"docker.io": settings})
    return caches


async def requests_sent(cache: Program, status: str) -> float:
    return await cache.metric("pullcache_upstream_requests_total", status=status)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_caches_that_are_mirrors_of_each_other_ask_the_registry_without_waiting(
    make_program, tmp_path, registry, count
):
    caches = await chain(make_program, tmp_path, count)
    image = registry.add_image(layers=[b"layer" * 1000])
    await caches[0].pull(image)
    assert (await caches[0].manifest("library/app", "absent")).status == 404
    assert (await caches[0].blob(ABSENT)).status == 404
    for cache in caches:
        # No request has run into a time limit.
        assert await requests_sent(cache, "error") == 0
        assert await cache.metric("pullcache_upstream_up") == 1
    assert await requests_sent(caches[-1], "508") > 0
    # Mirrors are still asked: the last cache's request for what the first has is a hit there.
    registry.requests.clear()
    for cache in caches:
        await cache.wait_for_downloads()
    await caches[-1].pull(image)
    assert registry.count("GET .*/blobs/") == 0


async def test_a_request_that_comes_back_gets_508(make_program, tmp_path, registry):
    (cache,) = await chain(make_program, tmp_path, 1)
    await cache.manifest("library/app", "absent")
    (via,) = {one.headers["Via"] for one in registry.requests if "absent" in one.target}
    for target in (
        "/v2/library/app/manifests/latest",
        f"/v2/library/app/blobs/{ABSENT}",
        "/v2/library/app/tags/list",
        f"/v2/library/app/referrers/{ABSENT}",
        "/v2/_catalog",
        "/v2/",
        "/v1/search?q=app",
    ):
        for method in ("GET", "HEAD"):
            answer = await cache.ask(target, method, Via=f"1.1 other, {via}, HTTP/1.1 nginx (x)")
            assert answer.status == 508
    assert (await cache.ask("/v2/library/app/manifests/latest", Via=via)).code == "UNKNOWN"
    # The next request of the same connection is another one.
    assert (await cache.ask("/v2/")).status == 200
    assert (await cache.ask("/healthz", Via=via)).status == 200


async def test_a_loop_of_upstreams_is_an_error_at_once_and_no_outage(make_program, tmp_path):
    caches = [await make_program(tmp_path / f"store{n}") for n in range(2)]
    for cache, other in (caches, reversed(caches)):
        assert await cache.reload(upstreams={"docker.io": {"url": other.url}})
    for _ in range(20):
        answer = await caches[0].manifest("library/app", "latest")
        assert answer.status == 508
        assert "name each other" in answer.json["errors"][0]["message"]
        assert (await caches[0].blob(ABSENT)).status == 404
    for cache in caches:
        assert await requests_sent(cache, "error") == 0
        assert await cache.metric("pullcache_upstream_up") == 1


async def test_via_names_all_caches_that_a_request_has_come_through(
    make_program, tmp_path, registry
):
    parent = await make_program(tmp_path / "parent")
    child = await make_program(tmp_path / "child", upstreams={"docker.io": {"url": parent.url}})
    image = registry.add_image()
    await child.pull(image)
    (via,) = {one.headers["Via"] for one in registry.requests if "/manifests/" in one.target}
    assert via.count(OWN) == 2
    registry.requests.clear()
    # What the parent asks for itself names the parent alone.
    await parent.manifest("library/app", "absent")
    vias = {one.headers["Via"] for one in registry.requests if "absent" in one.target}
    assert [via.count(OWN) for via in vias] == [1]


async def test_a_client_cannot_make_upstream_refuse_what_others_wait_for(program, registry):
    image = registry.add_image()
    ids = [f"1.1 pullcache-{n:016x}" for n in range(100)]
    via = ", ".join([*ids, "1.1 other", 'x"\\', "y" * 1000])
    assert (await program.manifest(image, Via=via)).status == 200
    (sent,) = {one.headers["Via"] for one in registry.requests if "/manifests/" in one.target}
    assert len(sent.split(", ")) == MAX_HOPS
    assert sent.split(", ")[:-1] == ids[1 - MAX_HOPS :]


async def test_a_redirects_target_learns_nothing_of_the_caches(program, registry):
    image = registry.add_image()
    await program.pull(image)
    elsewhere = [one for one in registry.requests if not one.target.startswith("/v2/")]
    assert len(elsewhere) > 1  # the token server and the CDN
    assert {one.headers.get("Via") for one in elsewhere} == {None}
    asked = [one for one in registry.requests if one.target.startswith("/v2/")]
    assert all("Via" in one.headers for one in asked)
