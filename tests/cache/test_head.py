"""Upstreams that refuse HEAD, or whose HEAD a GET contradicts: the GET counts."""

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import HTML, Fault

APP = "library/app"
HOUR = 3600
HEADS = "^HEAD .*/manifests/"
# What Nexus, Artifactory, firewalls and proxies answer to HEAD where GET is answered.
REFUSALS = {
    "404": Fault(status=404, body=b""),
    "400": Fault(status=400, body=b""),
    "403": Fault(status=403, body=b""),
    "405": Fault(status=405, body=b"", headers={"Allow": "GET"}),
    "500": Fault(status=500, body=b""),
    "501": Fault(status=501, body=b""),
    "503": Fault(status=503, body=b""),
    "no digest": Fault(headers={"Docker-Content-Digest": None}),
    "page": HTML,
    "hung up": Fault(hang_up=True),
    "unknown digest": Fault(headers={"Docker-Content-Digest": digest_of(b"nothing")}),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_tag_is_revalidated_and_moves_where_head_is_refused(
    registry, program, expired_image, refusal
):
    registry.fail(HEADS, REFUSALS[refusal], times=None)
    same = await program.manifest(expired_image)
    assert (same.status, same.digest) == (200, expired_image.digest)
    assert "Warning" not in same.headers
    moved = registry.add_image(layers=[b"new"])
    program.clock.advance(HOUR + 1)
    answer = await program.manifest(moved)
    assert (answer.status, answer.digest) == (200, moved.digest)
    assert "Warning" not in answer.headers
    assert await program.metric("pullcache_upstream_up") == 1


@pytest.mark.parametrize("refusal", ["404", "405", "no digest", "unknown digest"])
async def test_a_refused_head_is_left_out_for_an_hour(registry, make_program, refusal):
    image = registry.add_image()
    program = await make_program(manifests={"ttl": "1m"})
    await program.manifest(image)
    registry.fail(HEADS, REFUSALS[refusal], times=None)
    program.clock.advance(61)
    await program.manifest(image)
    heads = registry.count(HEADS)
    for _ in range(5):
        program.clock.advance(61)
        assert "Warning" not in (await program.manifest(image)).headers
    assert registry.count(HEADS) == heads
    registry.heal()
    program.clock.advance(HOUR)
    gets = registry.count("^GET .*/manifests/")
    await program.manifest(image)
    assert registry.count(HEADS) > heads
    assert registry.count("^GET .*/manifests/") == gets


async def test_a_head_that_failed_once_is_tried_again_soon(registry, program, expired_image):
    registry.fail(HEADS, Fault(status=503), times=2)
    await program.manifest(expired_image)
    program.clock.advance(HOUR)
    heads = registry.count(HEADS)
    await program.manifest(expired_image)
    assert registry.count(HEADS) == heads + 1


async def test_a_tag_that_get_does_not_find_either_is_gone(registry, program, expired_image):
    registry.delete_tag(APP, "latest")
    assert (await program.manifest(expired_image)).status == 404
    assert registry.count(HEADS) == 1
    # The deleted tag says nothing about HEAD.
    registry.move_tag(APP, "latest", expired_image.digest)
    program.clock.advance(HOUR)
    await program.manifest(expired_image)
    program.clock.advance(HOUR)
    await program.manifest(expired_image)
    assert registry.count(HEADS) == 2


async def test_an_upstream_that_fails_is_not_asked_twice_as_often(registry, program, expired_image):
    await registry.stop()
    assert "Warning" in (await program.manifest(expired_image)).headers
    await registry.start()
    registry.fail(HEADS, Fault(status=429), times=None)
    await program.wait_for_upstream()
    registry.requests.clear()
    assert "Warning" in (await program.manifest(expired_image)).headers
    assert [seen.method for seen in registry.seen("/library/app/")] == ["HEAD"]


async def test_the_last_pulls_are_not_spent_where_head_fails(registry, program, expired_image):
    registry.pulls = registry.pull_limit - 2
    registry.fail(HEADS, Fault(headers={"Docker-Content-Digest": None}), times=None)
    answer = await program.manifest(expired_image)
    assert "Warning" in answer.headers
    assert registry.pulls == registry.pull_limit - 2


@pytest.mark.parametrize("status", [400, 403, 404, 405, 500, 501])
async def test_a_shared_layer_is_found_where_head_of_a_blob_is_refused(registry, program, status):
    image = registry.add_image(layers=[b"shared"])
    await program.pull(image)
    other = registry.add_image("me/other", layers=[b"shared"])
    registry.cdn = False
    registry.fail("^HEAD .*/blobs/", Fault(status=status, body=b""), times=None)
    answer = await program.blob(other.layers[0], other.repository)
    assert (answer.status, answer.body) == (200, b"shared")
    # Sizes are found as well, and HEAD is left out from then on.
    for content in (b"unknown", b"another"):
        unknown = registry.add_blob(content, other.repository)
        head = await program.blob(unknown, other.repository, method="HEAD")
        assert (head.status, head.headers["Content-Length"]) == (200, "7")
    assert registry.count("^HEAD .*/blobs/") == (1 if status != 500 else 2)
    absent = await program.blob(digest_of(b"absent"), other.repository, method="HEAD")
    assert absent.status == 404


async def test_a_blobs_head_without_the_length_of_its_body_is_not_believed(registry, program):
    registry.cdn = False
    digest = registry.add_blob(b"content")
    registry.fail("^HEAD .*/blobs/", Fault(body=b""), times=None)
    head = await program.blob(digest, method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, "7")
    empty = registry.add_blob(b"")
    head = await program.blob(empty, method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, "0")
