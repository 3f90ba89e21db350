"""Redirected requests: CDNs that refuse a URL, and registries that redirect to other registries."""

import json

import pytest

from tests.fakes.content import FakeImage, digest_of
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

APP = "library/app"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


@pytest.fixture
def layer(registry: FakeRegistry) -> str:
    """The digest of a blob that a CDN serves."""
    return registry.add_blob(b"layer" * 10_000)


# S3, GCS, Azure, Cloudflare, CloudFront, Fastly.
@pytest.mark.parametrize("status", [400, 401, 403, 410, 408, 500, 502, 503, 504, 520, 522, 530])
async def test_a_url_that_the_cdn_refuses_is_replaced_by_a_new_one(
    registry, program, layer, status
):
    fault = Fault(status=status, body=DENIED, headers={"Content-Type": "application/xml"})
    registry.fail(registry.body_of(layer), fault, times=2)
    answer = await program.blob(layer)
    assert (answer.status, answer.digest, answer.is_whole) == (200, layer, True)
    await program.wait_for_downloads()
    assert program.stored() == {layer}
    # Each time the registry was asked for a new URL.
    urls = [seen.target for seen in registry.seen(registry.body_of(layer))]
    assert len(urls) == len(set(urls)) == 3


async def test_a_blob_that_is_passed_through_gets_a_new_url_too(registry, make_program):
    program = await make_program(store={"max_size": "20MB"})
    large = registry.add_blob(b"large" * 5_000_000)
    registry.fail(registry.body_of(large), Fault())
    registry.fail(registry.body_of(large), Fault(status=403, body=DENIED))
    answer = await program.blob(large)
    assert (answer.status, answer.digest, answer.is_whole) == (200, large, True)
    assert registry.count(registry.body_of(large)) == 3


async def test_a_cdn_that_always_refuses_is_asked_a_few_times(registry, program, layer):
    fault = Fault(status=403, body=DENIED)
    registry.fail(registry.body_of(layer), fault, times=None)
    answer = await program.blob(layer)
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    message = answer.json["errors"][0]["message"]
    assert "redirected to 127.0.0.1, which responded with status 403" in message
    assert registry.count(registry.body_of(layer)) == 3  # `fetch.attempts` of the tests
    # The registry itself is well.
    registry.heal()
    assert (await program.blob(registry.add_blob(b"other"))).status == 200


async def test_what_the_cdn_does_not_have_is_unknown_at_once(registry, program, layer):
    registry.fail(registry.body_of(layer), Fault(status=404, body=b""), times=None)
    assert (await program.blob(layer)).status == 404
    assert registry.count(registry.body_of(layer)) == 1


async def test_a_refusal_of_the_registry_is_not_repeated(registry, program, layer):
    await program.manifest(APP, "none")
    registry.fail("GET /v2/.*/blobs/", Fault(status=403, body=b""), times=None)
    before = registry.count("/blobs/")
    assert (await program.blob(layer)).status == 404
    assert registry.count("/blobs/") == before + 1


async def test_the_size_of_a_redirected_blob_survives_a_refusal(registry, program, layer):
    registry.fail(registry.body_of(layer), Fault(status=403, body=DENIED))
    head = await program.blob(layer, method="HEAD")
    assert (head.status, head.headers["Content-Length"]) == (200, "50000")


def redirect_to(registry: FakeRegistry, other: FakeRegistry, kind: str, image: FakeImage) -> None:
    """Let a registry redirect its requests of a kind to another registry, where the name differs."""
    other.add_image("mirror/k8s/app")
    for reference in ("latest", image.digest, image.config, *image.layers):
        location = f"{other.url}/v2/mirror/k8s/app/{kind}/{reference}"
        fault = Fault(status=307, body=b"", headers={"Location": location})
        registry.fail(f"/{kind}/{reference}$", fault, times=None)


async def test_another_registry_that_is_redirected_to_gets_a_token_of_its_own(
    registry: FakeRegistry, make_program
):
    login = {"username": "bob", "password": "CANARY"}
    registry.tokens.users["bob"] = "CANARY"
    async with FakeRegistry() as other:
        image = registry.add_image()
        for kind in ("manifests", "blobs"):
            redirect_to(registry, other, kind, image)
        program: Program = await make_program(
            upstreams={"docker.io": {"url": registry.url, **login}}
        )
        await program.pull(image)
        await program.wait_for_downloads()
        assert program.stored() == {image.digest, *image.blobs}
        # One token for all, for the name that the repository has there, and without credentials.
        (token,) = other.seen("/token")
        assert "scope=repository:mirror/k8s/app:pull" in token.target
        assert not [
            seen
            for seen in other.requests
            if not seen.headers.get("Authorization", "Bearer").startswith("Bearer")
        ]
        ours = {seen.headers.get("Authorization") for seen in registry.requests}
        theirs = {seen.headers.get("Authorization") for seen in other.requests}
        assert ours & theirs <= {None}


async def test_a_token_of_another_registry_is_renewed_when_it_is_rejected(
    registry: FakeRegistry, program
):
    async with FakeRegistry() as other:
        image = registry.add_image()
        redirect_to(registry, other, "manifests", image)
        for _ in range(3):
            assert (await program.manifest(APP)).digest == image.digest
            other.tokens.revoke()
            program.clock.advance(3600)
        assert other.count("/token") == 3


async def test_another_registry_that_rejects_every_token_is_a_refusal(
    registry: FakeRegistry, program
):
    async with FakeRegistry() as other:
        image = registry.add_image()
        redirect_to(registry, other, "manifests", image)
        other.repository("mirror/k8s/app").private = True
        answer = await program.manifest(APP)
        assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
        assert other.count("/v2/") <= 2


async def test_a_basic_challenge_of_another_host_gets_no_credentials(
    registry: FakeRegistry, make_program
):
    login = {"username": "bob", "password": "CANARY"}
    registry.tokens.users["bob"] = "CANARY"
    async with FakeRegistry(auth=False) as other:
        image = registry.add_image()
        redirect_to(registry, other, "manifests", image)
        challenge = {"WWW-Authenticate": 'Basic realm="other"'}
        other.fail("", Fault(status=401, body=b"", headers=challenge), times=None)
        program = await make_program(upstreams={"docker.io": {"url": registry.url, **login}})
        assert (await program.manifest(APP)).status == 404
        assert not [seen for seen in other.requests if "Authorization" in seen.headers]


async def test_a_redirect_may_lead_through_another_registry_to_its_cdn(
    registry: FakeRegistry, program
):
    async with FakeRegistry(cdn=True) as other:
        image = registry.add_image()
        redirect_to(registry, other, "blobs", image)
        for digest in image.blobs:
            assert (await program.blob(digest)).digest == digest
        assert json.loads((await program.blob(image.config)).body)["os"] == "linux"
        assert digest_of(b"layer") in image.layers
        assert other.count("GET /registry-v2/") == len(image.blobs)
