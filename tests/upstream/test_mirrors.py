"""Mirrors: if one fails in any way, the next one is tried."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.upstream import registry_client
from proxy.upstream.registry_client import REQUEST_TIMEOUT, RegistryTimeouts
from tests.fakes.content import FakeImage, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

HUB = "docker.io"
BLOB = bytes(range(256)) * 8192
DIGEST = digest_of(BLOB)
HALF = len(BLOB) // 2

MakeProgram = Callable[..., Awaitable[Program]]


@pytest.fixture
async def mirror() -> AsyncIterator[FakeRegistry]:
    """A second fake registry, used as a mirror."""
    async with FakeRegistry() as mirror:
        yield mirror


@pytest.fixture
def start_program(registry: FakeRegistry, make_program: MakeProgram, monkeypatch) -> MakeProgram:
    """Return a function that starts the program with these mirrors, which have short timeouts."""
    monkeypatch.setattr(registry_client, "MIRROR_TIMEOUT", 0.5)

    async def make(*mirrors: FakeRegistry, fetch: Any = None, **settings: Any) -> Program:
        upstream = {"url": registry.url, "mirrors": [each.url for each in mirrors], **settings}
        return await make_program(upstreams={HUB: upstream}, fetch=fetch or {})

    return make


def add_image(*registries: FakeRegistry, layers: tuple[bytes, ...] = (BLOB,)) -> FakeImage:
    """Add the same image to each of the registries."""
    images = [each.add_image(layers=layers, index=True) for each in registries]
    return images[0]


async def test_content_of_a_mirror_is_not_requested_from_the_registry(
    registry, mirror, start_program
):
    image = add_image(registry, mirror)
    program = await start_program(mirror)
    await program.pull(image)
    assert registry.requests == []
    program.clock.advance(3600)
    before = len(mirror.requests)
    assert (await program.manifest(image)).status == 200
    assert [seen.method for seen in mirror.requests[before:]] == ["HEAD"]
    assert registry.requests == []


async def test_mirrors_are_tried_in_order(registry, mirror, start_program):
    async with FakeRegistry() as second:
        image = add_image(registry, second)
        other = add_image(registry, layers=(b"other",))
        program = await start_program(mirror, second)
        await program.pull(image)
        assert registry.requests == []
        assert mirror.count(f"manifests/{image.tag}") > 0
        assert (await program.blob(other.layers[0])).status == 200
        hex_digest = other.layers[0][7:]
        assert mirror.count(hex_digest)
        assert second.count(hex_digest)
        assert registry.count(hex_digest)


FAULTS = {
    "404": Fault(status=404, body=b""),
    "401": Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Basic realm="x"'}),
    "403": Fault(status=403, body=b""),
    "429": Fault(status=429, body=b""),
    "500": Fault(status=500, body=b"oops"),
    "503": Fault(status=503, body=b""),
    "HTML page": HTML,
    "closes": Fault(hang_up=True),
    "hangs": Fault(until_headers=asyncio.Event()),
    "hangs after headers": Fault(stall_at=0, until=asyncio.Event()),
    "cut": Fault(cut_at=1),
    "wrong bytes": Fault(flip_at=0),
    "no bytes": Fault(body=b""),
    "redirects to a private address": Fault(
        status=307, body=b"", headers={"Location": "http://169.254.169.254/"}
    ),
}


@pytest.mark.parametrize("fault_name", FAULTS)
async def test_a_failing_mirror_is_skipped(registry, mirror, start_program, fault_name):
    image = add_image(registry, mirror)
    mirror.auth = mirror.cdn = False
    mirror.fail(" /v2/", FAULTS[fault_name], times=None)
    program = await start_program(mirror)
    if fault_name in ("wrong bytes", "no bytes"):
        # For a blob this is detected at its end; the next request goes to the registry.
        for blob in image.blobs:
            await program.blob(blob)
    await program.pull(image)
    assert mirror.requests


async def test_a_mirror_that_is_down_is_skipped(registry, mirror, start_program):
    image = add_image(registry, mirror)
    program = await start_program(mirror)
    await mirror.stop()
    await program.pull(image)
    assert await program.metric("pullcache_upstream_retries_total", reason="mirror") > 0
    assert await program.metric("pullcache_upstream_up", upstream=HUB) == 1


async def test_a_mirror_whose_token_server_hangs_soon_gets_no_more_requests(
    registry, mirror, start_program
):
    add_image(registry, mirror)
    mirror.fail("/token", Fault(until_headers=asyncio.Event()), times=None)
    program = await start_program(mirror)
    for n in range(3):
        assert (await program.manifest("library/app", f"none{n}")).status == 404
    mirror.requests.clear()
    assert (await program.manifest("library/app")).status == 200
    assert mirror.requests == []


async def test_a_mirror_that_keeps_failing_gets_no_requests_until_it_recovers(
    registry, mirror, start_program
):
    add_image(registry, mirror)
    registry.pull_limit = None
    mirror.fail("", Fault(status=503), times=None)
    program = await start_program(mirror)
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


async def test_upstream_is_up_while_the_registry_or_a_mirror_is(registry, mirror, start_program):
    image = add_image(registry, mirror)
    program = await start_program(mirror)
    await registry.stop()
    for n in range(3):
        assert (await program.manifest("library/app", f"none{n}")).status == 503
    assert await program.metric("pullcache_upstream_up", upstream=HUB) == 1
    await program.pull(image)
    await mirror.stop()
    while await program.metric("pullcache_upstream_up", upstream=HUB):
        assert (await program.manifest("library/other")).status == 503


async def test_clients_see_the_error_of_the_registry(registry, mirror, start_program):
    add_image(registry, mirror)
    program = await start_program(mirror)
    mirror.fail("/manifests/", Fault(status=500), times=None)
    response = await program.manifest("library/app", "none")
    assert (response.status, response.code) == (404, "MANIFEST_UNKNOWN")
    mirror.heal()
    async with registry.down():
        response = await program.manifest("library/app", "missing")
        assert (response.status, response.code) == (503, "UNAVAILABLE")
        assert response.json["errors"][0]["message"].startswith("docker.io ")
        assert "mirror" not in response.json["errors"][0]["message"]


@pytest.mark.parametrize(
    "challenge", ['Basic realm="x"', 'Bearer realm="{registry}/token",service="registry.fake"']
)
async def test_a_mirror_never_gets_the_credentials(registry, mirror, start_program, challenge):
    image = add_image(registry, mirror)
    registry.repository("library/app").private = True
    registry.tokens.users["bob"] = "CANARY"
    headers = {"WWW-Authenticate": challenge.format(registry=registry.url)}
    mirror.fail("/v2/", Fault(status=401, body=b"", headers=headers), times=None)
    program = await start_program(mirror, username="bob", password="CANARY")
    await program.pull(image)
    grants = registry.tokens._grants
    authorizations = [seen.headers.get("Authorization", "") for seen in mirror.requests]
    assert not [each for each in authorizations if each.startswith("Basic")]
    users = [grants[each.removeprefix("Bearer ")].user for each in authorizations if each]
    assert set(users) <= {None}


async def test_a_manifest_with_another_digest_is_fetched_from_the_registry(
    registry, mirror, start_program
):
    image = add_image(registry, mirror)
    mirror.fail("/manifests/", Fault(flip_at=3), times=None)
    program = await start_program(mirror)
    assert (await program.manifest(image, image.digest)).digest == image.digest
    assert await program.metric("pullcache_digest_mismatches_total", upstream=HUB) == 1
    assert mirror.count("GET .*/manifests/") == 2  # the 401 and then one attempt, without a retry


@pytest.mark.parametrize("registry_is_up", [True, False], ids=["registry", "mirror"])
async def test_a_transfer_that_a_mirror_breaks_off_is_resumed_elsewhere(
    registry, mirror, start_program, registry_is_up
):
    add_image(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(cut_at=HALF), times=None if registry_is_up else 1)
    program = await start_program(mirror)
    if not registry_is_up:
        await registry.stop()
    response = await program.blob(DIGEST)
    assert (response.status, response.is_whole, response.digest) == (200, True, DIGEST)
    resumed = (registry if registry_is_up else mirror).seen(mirror.body_of(DIGEST))[-1]
    assert resumed.headers["Range"] == f"bytes={HALF}-"


async def test_a_mirror_that_hangs_after_its_headers_causes_no_stalled_transfer(
    registry, mirror, start_program
):
    add_image(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(stall_at=0, until=asyncio.Event()), times=None)
    program = await start_program(mirror)
    assert (await program.blob(DIGEST)).digest == DIGEST
    assert await program.metric("pullcache_upstream_retries_total", reason="mirror") == 1
    assert await program.metric("pullcache_upstream_retries_total", reason="transfer") == 0


async def test_wrong_bytes_from_a_mirror_lead_to_a_clean_fetch_without_it(
    registry, mirror, start_program
):
    add_image(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(flip_at=7, cut_at=HALF), times=None)
    program = await start_program(mirror)
    mixed = await program.blob(DIGEST)
    assert not mixed.is_whole
    await program.wait_for_downloads()
    assert program.stored() == {DIGEST}
    rest, clean = registry.seen(registry.body_of(DIGEST))
    assert rest.headers["Range"].startswith(f"bytes={HALF}-")
    assert "Range" not in clean.headers
    assert mirror.count(mirror.body_of(DIGEST)) == 1
    response = await program.blob(DIGEST)
    assert (response.is_whole, response.digest) == (True, DIGEST)


async def test_a_mirror_that_sent_wrong_bytes_is_not_asked_for_the_blob_again(
    registry, mirror, start_program
):
    add_image(registry, mirror)
    mirror.fail(mirror.body_of(DIGEST), Fault(flip_at=7), times=None)
    program = await start_program(mirror)
    assert not (await program.blob(DIGEST)).is_whole
    await program.wait_for_downloads()
    assert program.stored() == set()
    requests_before = mirror.count(DIGEST[7:])
    async with registry.down():
        assert (await program.blob(DIGEST)).status == 404
    await program.wait_for_upstream()
    response = await program.blob(DIGEST)
    assert (response.is_whole, response.digest) == (True, DIGEST)
    assert mirror.count(DIGEST[7:]) == requests_before


@pytest.mark.parametrize(
    "fault", [Fault(), Fault(cut_at=1000), Fault(flip_at=3), Fault(ignore_range=True)]
)
async def test_a_large_blob_is_complete_whatever_a_mirror_does_to_its_pieces(
    registry, mirror, start_program, fault
):
    large = BLOB * 6
    add_image(registry, mirror, layers=(large,))
    program = await start_program(mirror, fetch={"parallel_above": "1MB"})
    mirror.fail(mirror.body_of(digest_of(large)), fault, times=None)
    answers = [await program.blob(digest_of(large)) for _ in range(2)]
    await program.wait_for_downloads()
    assert (answers[1].is_whole, answers[1].digest) == (True, digest_of(large))
    assert answers[0].is_whole == (fault.flip_at is None)


async def test_a_mirror_cannot_prove_that_a_repository_holds_cached_content(
    registry, mirror, start_program
):
    secret = registry.add_image("me/secret", layers=[b"secret"])
    program = await start_program(mirror)
    await program.pull(secret)
    mirror.auth = False
    affirmation = Fault(status=200, body=b"", headers={"Docker-Content-Digest": secret.digest})
    mirror.fail("HEAD ", affirmation, times=None)
    for down in (False, True):
        if down:
            await registry.stop()
        assert (await program.blob(secret.layers[0], "me/evil")).status == 404
        assert (await program.manifest("me/evil", secret.digest)).status in (404, 503)
        await program.wait_for_downloads()


async def test_a_blob_of_another_repository_is_sent_by_the_mirror_if_the_registry_proves_nothing(
    registry, mirror, start_program
):
    program = await start_program(mirror)
    await program.pull(add_image(registry))
    await program.wait_for_downloads()
    other = mirror.add_image("library/other", layers=[BLOB], docker=True)
    await registry.stop()
    for _ in range(2):
        await program.pull(other)
        await program.wait_for_downloads()
    assert mirror.count(mirror.body_of(DIGEST)) == 1


async def test_lists_come_only_from_the_registry(registry, mirror, start_program):
    image = add_image(registry, mirror)
    registry.add_image(tag="another")
    program = await start_program(mirror)
    assert (await program.ask("/v2/library/app/tags/list")).json["tags"] == ["another", "latest"]
    assert (await program.ask(f"/v2/library/app/referrers/{image.digest}")).status == 200
    assert mirror.requests == []


async def test_the_quota_of_a_mirror_is_not_that_of_the_upstream(registry, mirror, start_program):
    mirror.pull_limit = 2
    image = add_image(registry, mirror)
    registry.pull_limit = 1000
    program = await start_program(mirror)
    await program.pull(image)
    program.clock.advance(3600)
    moved = add_image(registry, mirror, layers=(b"moved",))
    assert (await program.manifest(image)).digest == moved.digest
    assert await program.metric("pullcache_upstream_ratelimit_limit") in (0, 1000)


async def test_an_offline_cache_sends_no_requests_to_mirrors(registry, mirror, make_program):
    add_image(registry, mirror)
    settings = {"url": registry.url, "mirrors": [mirror.url]}
    program = await make_program(upstreams={HUB: settings}, offline=True)
    assert (await program.manifest("library/app")).status == 503
    assert mirror.requests == registry.requests == []


async def test_the_size_of_a_blob_may_come_from_a_mirror(registry, mirror, start_program):
    add_image(registry, mirror)
    program = await start_program(mirror)
    response = await program.blob(DIGEST, method="HEAD")
    assert response.headers["Content-Length"] == str(len(BLOB))
    assert registry.requests == []


@given(st.integers(0, 50))
def test_hanging_mirrors_leave_the_registry_its_share_of_the_time(count):
    timeouts = RegistryTimeouts(connect=10, stall=30).for_mirror(count)
    assert timeouts.connect < timeouts.request <= 3
    left = REQUEST_TIMEOUT - count * timeouts.request
    assert left + 1e-9 >= timeouts.request
