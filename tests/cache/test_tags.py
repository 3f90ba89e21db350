"""Tags: revalidated by one HEAD after their TTL, and served stale while upstream fails."""

import asyncio

import pytest

from tests.fakes.faults import HTML, Fault

HOUR = 3600


async def test_a_hundred_requests_for_an_expired_tag_cause_one_head(
    registry, program, expired_image
):
    answers = await asyncio.gather(*(program.manifest(expired_image) for _ in range(100)))
    assert {answer.digest for answer in answers} == {expired_image.digest}
    assert [seen.method for seen in registry.requests] == ["HEAD"]


async def test_a_hundred_requests_for_a_new_tag_cause_one_get(registry, program):
    image = registry.add_image()
    answers = await asyncio.gather(*(program.manifest(image) for _ in range(100)))
    assert {answer.digest for answer in answers} == {image.digest}
    assert registry.pulls == 1
    assert registry.count("/manifests/") == 2  # once without a token


async def test_a_tag_that_did_not_move_is_fresh_again(registry, program, expired_image):
    first = await program.manifest(expired_image)
    program.clock.advance(100)
    second = await program.manifest(expired_image)
    assert len(registry.requests) == 1
    assert "fwd=stale" in first.headers["Cache-Status"]
    assert "hit" in second.headers["Cache-Status"]
    assert int(second.headers["Age"]) == 100


async def test_a_moved_tag_serves_the_new_manifest(registry, program, expired_image):
    moved = registry.add_image(layers=[b"new"])
    answer = await program.manifest(expired_image)
    assert (answer.digest, answer.headers["Docker-Content-Digest"]) == (moved.digest, moved.digest)
    assert [seen.line.rpartition("/")[2] for seen in registry.requests] == ["latest", moved.digest]
    old = await program.manifest(expired_image, expired_image.digest)
    assert old.digest == expired_image.digest


async def test_a_tag_that_moved_to_a_cached_manifest_costs_one_head(
    registry, program, expired_image
):
    older = registry.add_image(tag="older", layers=[b"older"])
    await program.manifest(older, "older")
    registry.requests.clear()
    registry.move_tag("library/app", "latest", older.digest)
    assert (await program.manifest(expired_image)).digest == older.digest
    assert [seen.method for seen in registry.requests] == ["HEAD"]


async def test_a_tag_that_was_deleted_upstream_is_404_but_its_content_stays(
    registry, program, expired_image
):
    registry.delete_tag("library/app", "latest")
    assert (await program.manifest(expired_image)).code == "MANIFEST_UNKNOWN"
    async with registry.down():
        assert (await program.manifest(expired_image)).status in (404, 503)
        assert (await program.manifest(expired_image, expired_image.digest)).status == 200


async def test_a_head_without_a_digest_is_followed_by_a_get(registry, program, expired_image):
    registry.fail("HEAD", Fault(headers={"Docker-Content-Digest": None}), times=None)
    moved = registry.add_image(layers=[b"new"])
    assert (await program.manifest(expired_image)).digest == moved.digest
    assert [seen.method for seen in registry.requests] == ["HEAD", "GET"]


FAILURES = {
    "refused": None,
    "500": Fault(status=500),
    "502": Fault(status=502, body=b"<html>bad gateway</html>"),
    "503": Fault(status=503, body=b""),
    "429": Fault(status=429, body=b"Too Many Requests"),
    "401": Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Bearer realm="x"'}),
    "403": Fault(status=403, body=b""),
    "hung up": Fault(hang_up=True),
    "login page": HTML,
    "empty": Fault(status=200, body=b"", headers={"Docker-Content-Digest": None}),
    "redirect loop": Fault(status=307, headers={"Location": "/v2/library/app/manifests/latest"}),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_however_upstream_fails_the_stale_copy_is_served(
    registry, program, expired_image, failure
):
    fault = FAILURES[failure]
    if fault is None:
        await registry.stop()
    else:
        registry.fail("/manifests/", fault, times=None)
    answers = [await program.manifest(expired_image) for _ in range(2)]
    for answer in answers:
        assert (answer.status, answer.digest) == (200, expired_image.digest)
        assert "fwd=stale" in answer.headers["Cache-Status"]
        assert answer.headers["Warning"].startswith('299 - "')
        assert len(answer.headers["Warning"]) < 512
        assert int(answer.headers["Age"]) == HOUR
    registry.heal()
    if fault is None:
        await registry.start()
    # Retry-After of upstream, or an open breaker, must pass first.
    program.clock.advance(61)
    while "Warning" in (answer := await program.manifest(expired_image)).headers:
        pass
    assert (answer.status, answer.digest) == (200, expired_image.digest)


async def test_a_tag_that_moved_to_wrong_bytes_serves_the_old_manifest(
    registry, program, expired_image
):
    moved = registry.add_image(layers=[b"new"])
    registry.fail(f"GET .*{moved.digest}", Fault(flip_at=30), times=None)
    answer = await program.manifest(expired_image)
    assert (answer.status, answer.digest) == (200, expired_image.digest)
    assert "fwd=stale" in answer.headers["Cache-Status"]
    registry.heal()
    await program.wait_for_upstream()
    assert (await program.manifest(expired_image)).digest == moved.digest


async def test_a_copy_that_is_too_old_is_not_served(registry, program, expired_image):
    program.clock.advance(31 * 24 * HOUR)
    async with registry.down():
        answer = await program.manifest(expired_image)
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert int(answer.headers["Retry-After"]) > 0


async def test_p10_after_the_clock_was_set_back_upstream_is_asked(registry, program, expired_image):
    program.clock.advance(-3 * HOUR)
    assert (await program.manifest(expired_image)).status == 200
    assert registry.count("HEAD") == 1


async def test_globs_set_the_ttl_of_tags(registry, make_program):
    program = await make_program(manifests={"tag_ttl": {"v*": "1d"}, "ttl": "1m"})
    for tag in ("v1", "latest"):
        image = registry.add_image(tag=tag)
        assert (await program.manifest(image, tag)).status == 200
    program.clock.advance(HOUR)
    registry.requests.clear()
    for tag in ("v1", "latest"):
        await program.manifest("library/app", tag)
    assert [seen.line for seen in registry.requests] == ["HEAD /v2/library/app/manifests/latest"]


async def test_with_stale_while_revalidate_an_expired_tag_is_served_at_once(registry, make_program):
    program = await make_program(manifests={"stale_while_revalidate": "1d"})
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(HOUR)
    release = asyncio.Event()
    moved = registry.add_image(layers=[b"new"])
    registry.fail("HEAD", Fault(until_headers=release))
    async with asyncio.timeout(5):
        assert (await program.manifest(image)).digest == image.digest
        await registry.until(lambda: registry.count("HEAD") == 1)
        release.set()
        while (await program.manifest(image)).digest != moved.digest:
            pass
    assert registry.count("HEAD") == 1


class TestMissing:
    """A missing tag is remembered for `negative_ttl`; a failure never is."""

    async def test_a_missing_tag_is_requested_once_per_negative_ttl(self, registry, program):
        registry.add_image()
        for _ in range(3):
            assert (await program.manifest("library/app", "none")).code == "MANIFEST_UNKNOWN"
        assert registry.count("/manifests/none") == 2  # once without a token
        program.clock.advance(31)
        await program.manifest("library/app", "none")
        assert registry.count("/manifests/none") == 3

    async def test_a_new_tag_is_found_after_the_negative_ttl(self, registry, program):
        image = registry.add_image()
        await program.manifest("library/app", "new")
        registry.move_tag("library/app", "new", image.digest)
        program.clock.advance(31)
        assert (await program.manifest("library/app", "new")).digest == image.digest

    @pytest.mark.parametrize("status", [429, 500, 503])
    async def test_a_failure_is_not_remembered_as_missing(self, registry, program, status):
        image = registry.add_image()
        registry.fail("/manifests/", Fault(status=status), times=3)
        assert (await program.manifest(image)).status in (429, 503)
        registry.heal()
        program.clock.advance(61)
        assert (await program.manifest(image)).status == 200

    async def test_a_repository_that_upstream_denies_is_404_without_a_challenge(
        self, registry, program
    ):
        answer = await program.manifest("library/private")
        assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
        assert "WWW-Authenticate" not in answer.headers


async def test_a_rate_limit_is_passed_on_with_its_retry_after(registry, program):
    registry.add_image()
    registry.fail("/manifests/", Fault(status=429, body=b"", headers={"Retry-After": "17"}))
    answer = await program.manifest("library/app")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
    assert answer.headers["Retry-After"] == "17"


async def test_a_response_that_is_not_a_manifest_is_neither_served_nor_stored(registry, program):
    image = registry.add_image()
    registry.fail("GET .*/manifests/", HTML, times=None)
    answer = await program.manifest(image)
    assert (answer.status, answer.code) == (502, "UNKNOWN")
    assert b"hotel" not in answer.body
    registry.heal()
    registry.fail("GET .*/manifests/sha256", Fault(flip_at=30), times=None)
    answer = await program.manifest(image, image.digest)
    assert answer.status == 502
    assert program.stored() == set()


async def test_a_manifest_that_changes_between_head_and_get_is_stored_under_its_own_digest(
    registry, program, expired_image
):
    registry.add_image(layers=[b"new"])
    wrong_digest = Fault(headers={"Docker-Content-Digest": expired_image.digest})
    registry.fail("GET .*/manifests/", wrong_digest, times=None)
    registry.fail("HEAD", Fault(headers={"Docker-Content-Digest": None}))
    answer = await program.manifest(expired_image)
    assert answer.headers["Docker-Content-Digest"] == answer.digest
