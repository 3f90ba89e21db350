"""Rate limits: remembered, obeyed, and no reason to fail what is cached."""

import asyncio

import pytest

from tests.fakes.faults import Fault

HOUR = 3600
PULLS = r"^GET .*/manifests/"
HEADS = r"^HEAD .*/manifests/"


def limited(seconds: int = 30, body: bytes = b"") -> Fault:
    return Fault(status=429, body=body, headers={"Retry-After": str(seconds)})


async def test_u19_a_limit_is_remembered_and_told_with_the_time_that_is_left(
    registry, program, pulled
):
    registry.add_image("library/other")
    registry.fail(PULLS, limited(), times=None)
    first = await program.manifest("library/other")
    asked = registry.count("/manifests/")
    program.clock.turn(10)
    answers = await asyncio.gather(
        *(program.manifest("library/other", reference) for reference in ("latest", "a", "b"))
    )
    for answer, left in ((first, "30"), *((answer, "20") for answer in answers)):
        assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
        assert answer.headers["Retry-After"] == left
    assert registry.count("/manifests/") == asked
    registry.heal()
    program.clock.turn(20)
    assert (await program.manifest("library/other")).status == 200


IN_TEN_YEARS = "Wed, 01 Jan 2036 00:00:00 GMT"


@pytest.mark.parametrize("value", [None, "30", IN_TEN_YEARS, "315360000", "-1", "soon"])
async def test_u19_whatever_a_limit_says_stale_tags_are_served_and_nobody_storms(
    registry, program, pulled, value
):
    registry.fail("/manifests/", Fault(status=429, headers={"Retry-After": value}), times=None)
    for _ in range(5):
        stale, new = await asyncio.gather(
            program.manifest(pulled), program.manifest("library/app", "new")
        )
        assert (stale.status, stale.digest) == (200, pulled.digest)
        assert "fwd=stale" in stale.headers["Cache-Status"]
        assert (new.status, new.code) == (429, "TOOMANYREQUESTS")
        assert 1 <= int(new.headers["Retry-After"]) <= 900
    assert registry.count("/manifests/") <= 2
    assert await program.metric("pullcache_upstream_ratelimit_remaining") == 99


async def test_while_pulls_are_limited_a_known_tag_is_still_asked_about(registry, program, pulled):
    registry.fail(PULLS, limited(), times=None)
    await program.manifest("library/app", "none")
    registry.requests.clear()
    same = await program.manifest(pulled)
    assert "Warning" not in same.headers
    assert [seen.method for seen in registry.requests] == ["HEAD"]
    moved = registry.add_image(layers=[b"new"])
    program.clock.turn(10)
    assert (await program.manifest(pulled)).digest == pulled.digest  # fresh, by that HEAD
    assert registry.count(PULLS) == 0
    registry.heal()
    program.clock.turn(HOUR)
    assert (await program.manifest(pulled)).digest == moved.digest


async def test_a_limit_on_heads_is_one_on_everything(registry, program, pulled):
    registry.fail("/manifests/|/tags/", limited(), times=None)
    answer = await program.manifest(pulled)
    assert "fwd=stale" in answer.headers["Cache-Status"]
    assert answer.headers["Warning"].startswith('299 - "stale: docker.io rate limit exceeded')
    asked = len(registry.requests)
    for asking in (
        program.manifest(pulled),
        program.manifest("library/app", "none"),
        program.ask("/v2/library/app/tags/list"),
    ):
        assert (await asking).status in (200, 429)
    assert len(registry.requests) == asked


async def test_the_abuse_limits_plain_text_is_told_as_a_limit(registry, program):
    registry.add_image()
    registry.fail("/manifests/", limited(7, b"Too Many Requests"), times=None)
    answer = await program.manifest("library/app")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
    assert answer.headers["Retry-After"] == "7"


async def test_a_limit_of_the_cdn_is_none_of_the_registry(registry, program):
    image = registry.add_image()
    registry.fail("/registry-v2/", limited(), times=None)
    blob = await program.blob(image.config)
    assert (blob.status, blob.code) == (429, "TOOMANYREQUESTS")
    assert (await program.manifest(image)).status == 200


async def test_limits_do_not_open_the_breaker(registry, program):
    registry.add_image()
    registry.fail("/manifests/", limited(1), times=None)
    for _ in range(10):
        assert (await program.manifest("library/app")).status == 429
        program.clock.turn(2)
    assert await program.metric("pullcache_upstream_up") == 1


class TestScarcity:
    """The last pulls are kept for what is not cached."""

    @pytest.fixture
    async def moved(self, registry, program, pulled):
        """The image that the expired tag stands for upstream, where three pulls are left."""
        registry.pulls = registry.pull_limit - 3
        return registry.add_image(layers=[b"new"])

    async def test_a_tag_that_moved_stays_where_it_was_and_the_answer_says_so(
        self, registry, program, pulled, moved
    ):
        for _ in range(3):
            answer = await program.manifest(pulled)
            assert (answer.status, answer.digest) == (200, pulled.digest)
            assert "fwd=stale" in answer.headers["Cache-Status"]
            assert "3 more of 100 pulls" in answer.headers["Warning"]
        assert [seen.method for seen in registry.requests] == ["HEAD"]
        assert await program.metric("pullcache_upstream_ratelimit_remaining") == 3

    async def test_its_ttl_stretches_once_and_then_it_is_asked_about_again(
        self, registry, program, pulled, moved
    ):
        await program.manifest(pulled)
        program.clock.turn(HOUR)
        registry.pulls = 0
        assert (await program.manifest(pulled)).digest == moved.digest

    async def test_what_is_not_cached_is_pulled(self, registry, program, pulled, moved):
        await program.manifest(pulled)
        assert (await program.manifest(moved, moved.digest)).digest == moved.digest

    async def test_a_tag_that_did_not_move_costs_a_head_as_ever(self, registry, program, pulled):
        registry.pulls = registry.pull_limit
        assert "Warning" not in (await program.manifest(pulled)).headers
        assert [seen.method for seen in registry.requests] == ["HEAD"]

    async def test_a_copy_that_is_too_old_is_replaced_all_the_same(
        self, registry, program, pulled, moved
    ):
        program.clock.turn(31 * 24 * HOUR)
        assert (await program.manifest(pulled)).digest == moved.digest

    async def test_an_account_without_limits_is_never_short_of_pulls(
        self, registry, program, pulled, moved
    ):
        await program.manifest(pulled)
        registry.pull_limit = None
        program.clock.turn(HOUR)
        assert (await program.manifest(pulled)).digest == moved.digest


async def test_a_limit_of_the_token_server_is_told_as_a_limit(registry, program):
    registry.add_image()
    registry.fail("/token", limited(), times=None)
    answer = await program.manifest("library/app")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
