"""Upstream's rate limits are remembered and respected; cached content is still served."""

import asyncio

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault

HOUR = 3600
PULLS = r"^GET .*/manifests/"
HEADS = r"^HEAD .*/manifests/"


def rate_limit(seconds: int = 30, body: bytes = b"") -> Fault:
    return Fault(status=429, body=body, headers={"Retry-After": str(seconds)})


async def test_u19_a_limit_is_remembered_and_reported_with_the_remaining_time(
    registry, program, expired_image
):
    registry.add_image("library/other")
    registry.fail(PULLS, rate_limit(), times=None)
    first = await program.manifest("library/other")
    requests = registry.count("/manifests/")
    program.clock.advance(10)
    answers = await asyncio.gather(
        *(program.manifest("library/other", reference) for reference in ("latest", "a", "b"))
    )
    for answer, remaining in ((first, "30"), *((answer, "20") for answer in answers)):
        assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
        assert answer.headers["Retry-After"] == remaining
    assert registry.count("/manifests/") == requests
    registry.heal()
    program.clock.advance(20)
    assert (await program.manifest("library/other")).status == 200


IN_TEN_YEARS = "Wed, 01 Jan 2036 00:00:00 GMT"


@pytest.mark.parametrize("value", [None, "30", IN_TEN_YEARS, "315360000", "-1", "soon"])
async def test_u19_whatever_a_limit_says_stale_tags_are_served_and_upstream_is_spared(
    registry, program, expired_image, value
):
    registry.fail("/manifests/", Fault(status=429, headers={"Retry-After": value}), times=None)
    for _ in range(5):
        stale, new = await asyncio.gather(
            program.manifest(expired_image), program.manifest("library/app", "new")
        )
        assert (stale.status, stale.digest) == (200, expired_image.digest)
        assert "fwd=stale" in stale.headers["Cache-Status"]
        assert (new.status, new.code) == (429, "TOOMANYREQUESTS")
        assert 1 <= int(new.headers["Retry-After"]) <= 900
    assert registry.count("/manifests/") <= 2
    assert await program.metric("pullcache_upstream_ratelimit_remaining") == 98


async def test_while_pulls_are_limited_a_cached_tag_is_still_revalidated(
    registry, program, expired_image
):
    registry.fail(PULLS, rate_limit(), times=None)
    await program.manifest("library/app", "none")
    registry.requests.clear()
    same = await program.manifest(expired_image)
    assert "Warning" not in same.headers
    assert [seen.method for seen in registry.requests] == ["HEAD"]
    moved = registry.add_image(layers=[b"new"])
    program.clock.advance(10)
    # Fresh since that HEAD.
    unchanged = await program.manifest(expired_image)
    assert unchanged.digest == expired_image.digest
    assert registry.count(PULLS) == 0
    registry.heal()
    program.clock.advance(HOUR)
    assert (await program.manifest(expired_image)).digest == moved.digest


KINDS = {
    "heads of manifests": HEADS,
    "manifests": PULLS,
    "blobs": "GET .*/blobs/",
    "tags": "/tags/list",
    "referrers": "/referrers/",
}


@pytest.mark.parametrize("limited", KINDS)
async def test_a_limit_on_one_kind_of_request_leaves_the_others_alone(
    registry, make_program, limited
):
    registry.pull_limit = None
    image = registry.add_image(layers=[b"one", b"two"])
    program = await make_program(manifests={"ttl": "0s"})
    await program.manifest(image)
    fault = Fault(status=429, body=b"Rate exceeded", headers={"Retry-After": "900"})
    registry.fail(KINDS[limited], fault, times=None)
    registry.requests.clear()
    requests = {
        "heads of manifests": lambda: program.manifest(image),
        "manifests": lambda: program.manifest(image, "other"),
        "blobs": lambda: program.blob(digest_of(b"one")),
        "tags": lambda: program.ask("/v2/library/app/tags/list"),
        "referrers": lambda: program.ask(f"/v2/library/app/referrers/{image.digest}"),
    }
    registry.move_tag("library/app", "other", image.digest)
    for _ in range(2):
        await requests[limited]()
    assert registry.count(KINDS[limited]) == 1  # the second was answered from memory
    for kind in requests.keys() - {limited}:
        answer = await requests[kind]()
        assert answer.status == 200, kind
        assert "Warning" not in answer.headers, kind
    # Nor does it concern other repositories.
    registry.heal()
    other = registry.add_image("library/other", layers=[b"three"])
    assert (await program.manifest(other)).status == 200
    assert (await program.blob(other.layers[0], other.repository)).status == 200


async def test_without_retry_after_a_blob_is_asked_for_again_after_seconds_that_grow(
    registry, program
):
    image = registry.add_image()
    registry.cdn = False
    registry.fail("GET .*/blobs/", Fault(status=429), times=None)
    for seconds in ("1", "2", "4", "8"):
        answer = await program.blob(image.config)
        assert (answer.status, answer.headers["Retry-After"]) == (429, seconds)
        assert (await program.blob(image.config)).status == 429
        program.clock.advance(int(seconds))
    assert registry.count("GET .*/blobs/") == 4
    registry.heal()
    assert (await program.blob(image.config)).status == 200


async def test_a_limit_of_docker_hub_on_pulls_concerns_all_repositories(registry, program):
    registry.add_image()
    registry.add_image("library/other")
    registry.pulls = registry.pull_limit
    for repository in ("library/app", "library/other"):
        answer = await program.manifest(repository)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "60")
    assert registry.count(f"{PULLS}latest") == 1 + 1  # once without a token


async def test_docker_hubs_abuse_limit_in_plain_text_is_reported_as_a_limit(registry, program):
    registry.add_image()
    registry.fail("/manifests/", rate_limit(7, b"Too Many Requests"), times=None)
    answer = await program.manifest("library/app")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
    assert answer.headers["Retry-After"] == "7"


async def test_a_limit_of_the_cdn_does_not_apply_to_the_registry(registry, program):
    image = registry.add_image()
    registry.fail("/registry-v2/", rate_limit(), times=None)
    blob = await program.blob(image.config)
    assert (blob.status, blob.code) == (429, "TOOMANYREQUESTS")
    assert (await program.manifest(image)).status == 200


async def test_limits_do_not_open_the_breaker(registry, program):
    registry.add_image()
    registry.fail("/manifests/", rate_limit(1), times=None)
    for _ in range(10):
        assert (await program.manifest("library/app")).status == 429
        program.clock.advance(2)
    assert await program.metric("pullcache_upstream_up") == 1


class TestScarcity:
    """The last pulls of the quota are reserved for content that is not cached."""

    @pytest.fixture
    async def moved(self, registry, program, expired_image):
        """The image that the expired tag names upstream now, where three pulls are left."""
        registry.pulls = registry.pull_limit - 3
        return registry.add_image(layers=[b"new"])

    async def test_the_old_manifest_of_a_moved_tag_is_served_with_a_warning(
        self, registry, program, expired_image, moved
    ):
        for _ in range(3):
            answer = await program.manifest(expired_image)
            assert (answer.status, answer.digest) == (200, expired_image.digest)
            assert "fwd=stale" in answer.headers["Cache-Status"]
            assert "3 more of 100 pulls" in answer.headers["Warning"]
        assert [seen.method for seen in registry.requests] == ["HEAD"]
        assert await program.metric("pullcache_upstream_ratelimit_remaining") == 3

    async def test_the_tag_is_revalidated_again_after_another_ttl(
        self, registry, program, expired_image, moved
    ):
        await program.manifest(expired_image)
        program.clock.advance(HOUR)
        registry.pulls = 0
        assert (await program.manifest(expired_image)).digest == moved.digest

    async def test_content_that_is_not_cached_is_pulled(
        self, registry, program, expired_image, moved
    ):
        await program.manifest(expired_image)
        assert (await program.manifest(moved, moved.digest)).digest == moved.digest

    async def test_a_tag_that_did_not_move_costs_a_head_as_always(
        self, registry, program, expired_image
    ):
        registry.pulls = registry.pull_limit
        assert "Warning" not in (await program.manifest(expired_image)).headers
        assert [seen.method for seen in registry.requests] == ["HEAD"]

    async def test_a_copy_that_is_too_old_to_be_served_is_replaced(
        self, registry, program, expired_image, moved
    ):
        program.clock.advance(31 * 24 * HOUR)
        assert (await program.manifest(expired_image)).digest == moved.digest

    async def test_an_account_without_a_limit_is_never_short_of_pulls(
        self, registry, program, expired_image, moved
    ):
        await program.manifest(expired_image)
        registry.pull_limit = None
        program.clock.advance(HOUR)
        assert (await program.manifest(expired_image)).digest == moved.digest


async def test_a_limit_of_the_token_server_is_reported_as_a_limit(registry, program):
    registry.add_image()
    registry.fail("/token", rate_limit(), times=None)
    answer = await program.manifest("library/app")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
