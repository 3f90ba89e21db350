"""Mirrors may help and never harm: what goes wrong with one costs time, and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.upstream import registry_client
from proxy.upstream.registry_client import REQUEST_TIMEOUT, RegistryTimeouts
from tests.fakes.content import Image, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

HUB = "docker.io"
BLOB = bytes(range(256)) * 8192
DIGEST = digest_of(BLOB)
HALF = len(BLOB) // 2

Behind = Callable[..., Awaitable[Program]]


@pytest.fixture
async def mirror() -> AsyncIterator[FakeRegistry]:
    """A registry that plays a mirror."""
    async with FakeRegistry() as mirror:
        yield mirror


@pytest.fixture
def behind(registry: FakeRegistry, make_program: Behind, monkeypatch) -> Behind:
    """Start the program before the registry and these mirrors, which are waited for but shortly."""
    monkeypatch.setattr(registry_client, "MIRROR_TIMEOUT", 0.5)

    async def make(*mirrors: FakeRegistry, fetch: Any = None, **settings: Any) -> Program:
        table = {"url": registry.url, "mirrors": [one.url for one in mirrors], **settings}
        return await make_program(upstreams={HUB: table}, fetch=fetch or {})

    return make


def pushed(*registries: FakeRegistry, layers: tuple[bytes, ...] = (BLOB,)) -> Image:
    """Push one image to all of them."""
    images = [one.add_image(layers=layers, index=True) for one in registries]
    return images[0]


async def test_what_a_mirror_has_is_not_asked_of_the_registry(registry, mirror, behind):
    image = pushed(registry, mirror)
    program = await behind(mirror)
    await program.pull(image)
    assert registry.requests == []
    program.clock.turn(3600)
    before = len(mirror.requests)
    assert (await program.manifest(image)).status == 200
    assert [seen.method for seen in mirror.requests[before:]] == ["HEAD"]
    assert registry.requests == []


async def test_mirrors_are_asked_in_their_order(registry, mirror, behind):
    async with FakeRegistry() as second:
        image = pushed(registry, second)
        other = pushed(registry, layers=(b"other",))
        program = await behind(mirror, second)
        await program.pull(image)
        assert registry.requests == []
        assert mirror.count(f"manifests/{image.tag}") > 0
        assert (await program.blob(other.layers[0])).status == 200
        hexdigits = other.layers[0][7:]
        assert mirror.count(hexdigits)
        assert second.count(hexdigits)
        assert registry.count(hexdigits)


FAULTS = {
    "404": Fault(status=404, body=b""),
    "401": Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Basic realm="x"'}),
    "403": Fault(status=403, body=b""),
    "429": Fault(status=429, body=b""),
    "500": Fault(status=500, body=b"oops"),
    "503": Fault(status=503, body=b""),
    "a page": HTML,
    "hangs up": Fault(hang_up=True),
    "silent": Fault(until_headers=asyncio.Event()),
    "silent after its headers": Fault(stall_at=0, until=asyncio.Event()),
    "cut": Fault(cut_at=1),
    "wrong bytes": Fault(flip_at=0),
    "no bytes": Fault(body=b""),
    "leads inside": Fault(status=307, body=b"", headers={"Location": "http://169.254.169.254/"}),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_mirror_that_fails_is_passed_over(registry, mirror, behind, name):
    image = pushed(registry, mirror)
    mirror.auth = mirror.cdn = False
    mirror.fail(" /v2/", FAULTS[name], times=None)
    program = await behind(mirror)
    if name in ("wrong bytes", "no bytes"):
        # Of blobs that shows at the end: the next request asks the registry.
        for blob in image.blobs:
            await program.blob(blob)
    await program.pull(image)
    assert mirror.requests


async def test_a_mirror_that_is_down_is_passed_over(registry, mirror, behind):
    image = pushed(registry, mirror)
    program = await behind(mirror)
    await mirror.stop()
    await program.pull(image)
    assert await program.metric("pullcache_upstream_retries_total", reason="mirror") > 0
    assert await program.metric("pullcache_upstream_up", upstream=HUB) == 1


async def test_a_mirror_whose_token_server_is_silent_is_soon_asked_no_more(
    registry, mirror, behind
):
    pushed(registry, mirror)
    mirror.fail("/token", Fault(until_headers=asyncio.Event()), times=None)
    program = await behind(mirror)
    for n in range(3):
        assert (await program.manifest("library/app", f"none{n}")).status == 404
    mirror.requests.clear()
    assert (await program.manifest("library/app")).status == 200
    assert mirror.requests == []


async def test_a_mirror_that_keeps_failing_is_left_alone_until_it_recovers(
    registry, mirror, behind
):
    pushed(registry, mirror)
    registry.pull_limit = None
    mirror.fail("", Fault(status=503), times=None)
    program = await behind(mirror)
    for n in range(6):
        assert (await program.manifest("library/app", f"none{n}")).status == 404
    assert len(mirror.requests) == 5
    mirror.heal()
    while not mirror.count("/manifests/latest"):
        assert (
            await program.manifest("library/app", f"none{len(registry.requests)}")
        ).status == 404
        if len(mirror.requests) > 5:  # the probe
            assert (await program.manifest("library/app")).status == 200


async def test_upstream_counts_as_up_while_anybody_is_asked(registry, mirror, behind):
    image = pushed(registry, mirror)
    program = await behind(mirror)
    await registry.stop()
    for n in range(3):
        assert (await program.manifest("library/app", f"none{n}")).status == 503
    assert await program.metric("pullcache_upstream_up", upstream=HUB) == 1
    await program.pull(image)
    await mirror.stop()
    while await program.metric("pullcache_upstream_up", upstream=HUB):
        assert (await program.manifest("library/other")).status == 503


async def test_the_error_that_is_told_is_the_registrys(registry, mirror, behind):
    pushed(registry, mirror)
    program = await behind(mirror)
    mirror.fail("/manifests/", Fault(status=500), times=None)
    answer = await program.manifest("library/app", "none")
    assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
    mirror.heal()
    async with registry.down():
        answer = await program.manifest("library/app", "missing")
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
        assert answer.json["errors"][0]["message"].startswith("docker.io ")
        assert "mirror" not in answer.json["errors"][0]["message"]


@pytest.mark.parametrize(
    "challenge", ['Basic realm="x"', 'Bearer realm="{registry}/token",service="registry.fake"']
)
async def test_a_mirror_is_never_told_the_login(registry, mirror, behind, challenge):
    image = pushed(registry, mirror)
    registry.repository("library/app").private = True
    registry.tokens.users["bob"] = "CANARY"
    headers = {"WWW-Authenticate": challenge.format(registry=registry.url)}
    mirror.fail("/v2/", Fault(status=401, body=b"", headers=headers), times=None)
    program = await behind(mirror, username="bob", password="CANARY")
    await program.pull(image)
    issued = registry.tokens._grants
    told = [seen.headers.get("Authorization", "") for seen in mirror.requests]
    assert not [one for one in told if one.startswith("Basic")]
    users = [issued[one.removeprefix("Bearer ")].user for one in told if one]
    assert set(users) <= {None}


async def test_a_manifest_with_another_digest_is_asked_of_the_next(registry, mirror, behind):
    image = pushed(registry, mirror)
    mirror.fail("/manifests/", Fault(flip_at=3), times=None)
    program = await behind(mirror)
    assert (await program.manifest(image, image.digest)).digest == image.digest
    assert await program.metric("pullcache_digest_mismatches_total", upstream=HUB) == 1
    assert mirror.count("GET .*/manifests/") == 2  # and the 401 before it: once, no retry


@pytest.mark.parametrize("is_up", [True, False], ids=["registry", "mirror"])
async def test_a_transfer_that_a_mirror_breaks_off_is_resumed_where_it_is_to_be_had(
    registry, mirror, behind, is_up
):
    pushed(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(cut_at=HALF), times=None if is_up else 1)
    program = await behind(mirror)
    if not is_up:
        await registry.stop()
    answer = await program.blob(DIGEST)
    assert (answer.status, answer.is_whole, answer.digest) == (200, True, DIGEST)
    resumed = (registry if is_up else mirror).seen(mirror.body_of(DIGEST))[-1]
    assert resumed.headers["Range"] == f"bytes={HALF}-"


async def test_a_mirror_that_is_silent_after_its_headers_costs_no_stalled_transfer(
    registry, mirror, behind
):
    pushed(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(stall_at=0, until=asyncio.Event()), times=None)
    program = await behind(mirror)
    assert (await program.blob(DIGEST)).digest == DIGEST
    assert await program.metric("pullcache_upstream_retries_total", reason="mirror") == 1
    assert await program.metric("pullcache_upstream_retries_total", reason="transfer") == 0


async def test_wrong_bytes_of_a_mirror_cost_one_clean_fetch_without_it(registry, mirror, behind):
    pushed(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(flip_at=7, cut_at=HALF), times=None)
    program = await behind(mirror)
    mixed = await program.blob(DIGEST)
    assert not mixed.is_whole
    await program.settled()
    assert program.stored() == {DIGEST}
    rest, clean = registry.seen(registry.body_of(DIGEST))
    assert rest.headers["Range"].startswith(f"bytes={HALF}-")
    assert "Range" not in clean.headers
    assert mirror.count(mirror.body_of(DIGEST)) == 1
    answer = await program.blob(DIGEST)
    assert (answer.is_whole, answer.digest) == (True, DIGEST)


async def test_a_blob_that_a_mirror_has_spoilt_is_not_asked_of_it_again(registry, mirror, behind):
    pushed(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(flip_at=7), times=None)
    program = await behind(mirror)
    assert not (await program.blob(DIGEST)).is_whole
    await program.settled()
    assert program.stored() == set()
    asked = mirror.count(DIGEST[7:])
    async with registry.down():
        assert (await program.blob(DIGEST)).status == 404
    await program.recovered()
    answer = await program.blob(DIGEST)
    assert (answer.is_whole, answer.digest) == (True, DIGEST)
    assert mirror.count(DIGEST[7:]) == asked


@pytest.mark.parametrize(
    "fault", [Fault(), Fault(cut_at=1000), Fault(flip_at=3), Fault(ignore_range=True)]
)
async def test_a_large_blob_comes_whole_whatever_a_mirror_makes_of_its_pieces(
    registry, mirror, behind, fault
):
    large = BLOB * 6
    pushed(registry, mirror, layers=(large,))
    program = await behind(mirror, fetch={"parallel_above": "1MB"})
    mirror.fail(mirror.body_of(digest_of(large)), fault, times=None)
    answers = [await program.blob(digest_of(large)) for _ in range(2)]
    await program.settled()
    assert (answers[1].is_whole, answers[1].digest) == (True, digest_of(large))
    assert answers[0].is_whole == (fault.flip_at is None)


async def test_a_mirror_cannot_prove_that_a_repository_holds_what_is_cached(
    registry, mirror, behind
):
    secret = registry.add_image("me/secret", layers=[b"secret"])
    program = await behind(mirror)
    await program.pull(secret)
    mirror.auth = False
    says_yes = Fault(status=200, body=b"", headers={"Docker-Content-Digest": secret.digest})
    mirror.fail("HEAD ", says_yes, times=None)
    for down in (False, True):
        if down:
            await registry.stop()
        assert (await program.blob(secret.layers[0], "me/evil")).status == 404
        assert (await program.manifest("me/evil", secret.digest)).status in (404, 503)
        await program.settled()


async def test_a_manifest_from_a_mirror_links_what_it_names(registry, mirror, behind):
    program = await behind(mirror)
    await program.pull(pushed(registry))
    await program.settled()
    other = mirror.add_image("library/other", layers=[BLOB], docker=True)
    await registry.stop()
    await program.pull(other)
    assert mirror.count(DIGEST[7:]) == 2  # while the first image came: 401, and none after it


async def test_lists_come_from_the_registry_alone(registry, mirror, behind):
    image = pushed(registry, mirror)
    registry.add_image(tag="another")
    program = await behind(mirror)
    assert (await program.ask("/v2/library/app/tags/list")).json["tags"] == ["another", "latest"]
    assert (await program.ask(f"/v2/library/app/referrers/{image.digest}")).status == 200
    assert mirror.requests == []


async def test_the_limits_of_a_mirror_are_not_those_of_the_upstream(registry, mirror, behind):
    mirror.pull_limit = 2
    image = pushed(registry, mirror)
    registry.pull_limit = 1000
    program = await behind(mirror)
    await program.pull(image)
    program.clock.turn(3600)
    moved = pushed(registry, mirror, layers=(b"moved",))
    assert (await program.manifest(image)).digest == moved.digest
    assert await program.metric("pullcache_upstream_ratelimit_limit") in (0, 1000)


async def test_an_offline_cache_asks_no_mirror(registry, mirror, make_program):
    pushed(registry, mirror)
    table = {"url": registry.url, "mirrors": [mirror.url]}
    program = await make_program(upstreams={HUB: table}, offline=True)
    assert (await program.manifest("library/app")).status == 503
    assert mirror.requests == registry.requests == []


async def test_the_size_of_a_blob_is_told_by_a_mirror(registry, mirror, behind):
    pushed(registry, mirror)
    program = await behind(mirror)
    answer = await program.blob(DIGEST, method="HEAD")
    assert answer.headers["Content-Length"] == str(len(BLOB))
    assert registry.requests == []


@given(st.integers(0, 50))
def test_silent_mirrors_leave_the_registry_its_share_of_the_time(count):
    timeouts = RegistryTimeouts(connect=10, stall=30).for_mirror(count)
    assert timeouts.connect < timeouts.request <= 3
    left = REQUEST_TIMEOUT - count * timeouts.request
    assert left + 1e-9 >= timeouts.request
