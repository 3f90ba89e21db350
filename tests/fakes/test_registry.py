"""The fake registry responds as real registries do, and applies the faults it is given."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
from yarl import URL

from tests.fakes.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    digest_of,
)
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry

LAYER = bytes(range(256)) * 2048


@dataclass
class TokenClient:
    """A registry client that follows no redirect and decodes no body."""

    session: aiohttp.ClientSession
    registry: FakeRegistry

    async def token(self, repository: str = "library/app", **headers: str) -> str:
        target = f"/token?service=registry.fake&scope=repository:{repository}:pull"
        async with self.session.get(self.registry.url + target, headers=headers) as response:
            assert response.status == 200
            return str((await response.json())["token"])

    async def ask(
        self, path: str, *, method: str = "GET", bearer: str | None = None, **headers: str
    ) -> tuple[int, "aiohttp.ClientResponse", bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if bearer is not None:
            named["Authorization"] = f"Bearer {bearer}"
        url = URL(path if path.startswith("http") else self.registry.url + path, encoded=True)
        async with self.session.request(
            method, url, headers=named, allow_redirects=False
        ) as response:
            return response.status, response, await response.read()


@pytest.fixture
async def client(registry: FakeRegistry) -> AsyncIterator[TokenClient]:
    async with aiohttp.ClientSession(requote_redirect_url=False, auto_decompress=False) as session:
        yield TokenClient(session, registry)


async def test_every_request_needs_a_token_for_its_repository(registry, client):
    image = registry.add_image()
    path = f"/v2/library/app/manifests/{image.digest}"
    status, answer, _ = await client.ask(path)
    assert status == 401
    challenge = answer.headers["WWW-Authenticate"]
    assert re.fullmatch(
        rf'Bearer realm="{registry.url}/token",service="registry.fake",'
        r'scope="repository:library/app:pull"',
        challenge,
    )
    assert (await client.ask(path, bearer="forged"))[0] == 401
    assert (await client.ask(path, bearer=await client.token("library/other")))[0] == 401
    status, answer, body = await client.ask(path, bearer=await client.token())
    assert (status, digest_of(body)) == (200, image.digest)
    assert answer.headers["Docker-Content-Digest"] == image.digest


async def test_a_repository_that_does_not_exist_is_401_even_with_a_token(registry, client):
    token = await client.token("library/none")
    status, answer, _ = await client.ask("/v2/library/none/manifests/latest", bearer=token)
    assert status == 401
    assert 'error="insufficient_scope"' in answer.headers["WWW-Authenticate"]


async def test_a_missing_tag_in_a_visible_repository_is_404(registry, client):
    registry.add_image()
    token = await client.token()
    status, _, body = await client.ask("/v2/library/app/manifests/none", bearer=token)
    assert status == 404
    assert b"MANIFEST_UNKNOWN" in body


async def test_a_private_repository_needs_the_token_of_a_user(registry, client):
    registry.add_image("me/secret")
    registry.repository("me/secret").private = True
    registry.tokens.users["bob"] = "pw"
    path = "/v2/me/secret/manifests/latest"
    anonymous = await client.token("me/secret")
    assert (await client.ask(path, bearer=anonymous, Accept=OCI_MANIFEST))[0] == 401
    login = await client.token("me/secret", Authorization="Basic Ym9iOnB3")
    assert (await client.ask(path, bearer=login, Accept=OCI_MANIFEST))[0] == 200
    wrong = await client.ask("/token?scope=x", Authorization="Basic Ym9iOm5v")
    assert wrong[0] == 401


async def test_a_revoked_token_is_refused(registry, client):
    registry.add_image()
    token = await client.token()
    assert (await client.ask("/v2/", bearer=token))[0] == 200
    registry.tokens.revoke()
    assert (await client.ask("/v2/", bearer=token))[0] == 401


async def test_blobs_are_served_from_signed_urls_that_must_be_used_unchanged(registry, client):
    digest = registry.add_blob(LAYER)
    token = await client.token()
    status, answer, _ = await client.ask(f"/v2/library/app/blobs/{digest}", bearer=token)
    assert status == 307
    location = answer.headers["Location"]
    assert "%2F" in location
    assert location.startswith(registry.edge.url)
    assert registry.edge.url != registry.url
    assert (await client.ask(location))[2] == LAYER
    assert (await client.ask(location.replace("%2F", "/")))[0] == 403
    assert (await client.ask(location, bearer=token))[0] == 400
    assert (await client.ask(location, method="HEAD"))[0] == 403
    registry.expire_addresses()
    assert (await client.ask(location))[0] == 403


@pytest.mark.parametrize("cdn", [True, False])
@pytest.mark.parametrize(
    ("requested", "status", "part"),
    [
        ("bytes=100-199", 206, slice(100, 200)),
        ("bytes=524000-", 206, slice(524000, None)),
        ("bytes=-10", 206, slice(-10, None)),
        ("bytes=0-99999999", 206, slice(None)),
        ("bytes=524288-", 416, slice(0, 0)),
    ],
)
async def test_blobs_support_ranges(client, cdn, requested, status, part):
    registry = client.registry
    registry.cdn = cdn
    digest = registry.add_blob(LAYER)
    path = f"/v2/library/app/blobs/{digest}"
    token: str | None = await client.token()
    if cdn:
        path = (await client.ask(path, bearer=token))[1].headers["Location"]
        token = None
    seen, answer, body = await client.ask(path, bearer=token, Range=requested)
    assert (seen, body) == (status, LAYER[part])
    assert answer.headers["Content-Range"].endswith(f"/{len(LAYER)}")


async def test_a_head_does_not_count_as_a_pull_and_a_get_does(registry, client):
    registry.pull_limit = 2
    image = registry.add_image()
    token = await client.token()
    path = f"/v2/library/app/manifests/{image.digest}"
    for _ in range(3):
        status, answer, _ = await client.ask(path, method="HEAD", bearer=token)
        assert status == 200
        assert answer.headers["ratelimit-remaining"] == "2;w=21600"
        assert int(answer.headers["Content-Length"]) > 0
    assert [(await client.ask(path, bearer=token))[0] for _ in range(3)] == [200, 200, 429]
    assert (await client.ask(path, method="HEAD", bearer=token))[0] == 200


@pytest.mark.parametrize(
    ("docker", "index", "accept", "media_type"),
    [
        (False, True, OCI_INDEX, OCI_INDEX),
        (False, True, OCI_MANIFEST, None),
        (False, True, "*/*", None),
        (False, False, f"{OCI_INDEX}, {OCI_MANIFEST};q=0.1", OCI_MANIFEST),
        (True, True, DOCKER_LIST, DOCKER_LIST),
        (True, True, DOCKER_MANIFEST, DOCKER_MANIFEST),
        (True, True, "*/*", "application/vnd.docker.distribution.manifest.v1+prettyjws"),
    ],
)
async def test_accept_is_matched_by_exact_media_type(client, docker, index, accept, media_type):
    client.registry.add_image(docker=docker, index=index)
    token = await client.token()
    status, answer, body = await client.ask(
        "/v2/library/app/manifests/latest", bearer=token, Accept=accept
    )
    if media_type is None:
        assert status == 404
    else:
        assert answer.headers["Content-Type"] == media_type
        assert answer.headers["Docker-Content-Digest"] == digest_of(body)


async def test_tags_come_in_pages_with_links(registry, client):
    registry.auth = False
    image = registry.add_image(tag="a")
    for tag in "bcde":
        registry.move_tag("library/app", tag, image.digest)
    registry.tags_page = 2
    tags: list[str] = []
    path: str | None = "/v2/library/app/tags/list"
    async with asyncio.timeout(5):
        while path:
            async with client.session.get(registry.url + path) as response:
                tags += (await response.json())["tags"]
                link = response.headers.get("Link")
                path = link.partition(">")[0][1:] if link else None
    assert tags == list("abcde")
    assert registry.count("tags/list") == 3


async def test_referrers_are_the_manifests_with_that_subject_unless_switched_off(registry, client):
    registry.auth = False
    image = registry.add_image()
    body = b'{"artifactType":"a/b","subject":{"digest":"%s"}}' % image.digest.encode()
    signature = registry.add_manifest("library/app", None, body, OCI_MANIFEST)
    path = f"/v2/library/app/referrers/{image.digest}"
    async with client.session.get(registry.url + path) as response:
        assert [one["digest"] for one in (await response.json(content_type=None))["manifests"]] == [
            signature
        ]
    _, answer, body = await client.ask(path + "?artifactType=x/y")
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    assert signature.encode() not in body
    registry.referrers = False
    assert (await client.ask(path))[0] == 404


async def test_after_an_outage_it_listens_on_the_same_port(registry, client):
    url = registry.url
    async with registry.down():
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.ask("/v2/")
    assert registry.url == url
    assert (await client.ask("/v2/"))[0] == 401


class TestFaults:
    """Faults of a request for a blob that needs neither token nor CDN."""

    @pytest.fixture(autouse=True)
    def _push_blob(self, registry):
        registry.auth = registry.cdn = False
        self.path = f"/v2/library/app/blobs/{registry.add_blob(LAYER)}"

    async def test_a_fault_applies_as_often_as_specified(self, registry, client):
        registry.fail("GET .*/blobs/", Fault(status=503, body=b"no"), times=2)
        seen = [(await client.ask(self.path))[0] for _ in range(3)]
        assert seen == [503, 503, 200]

    async def test_other_requests_are_not_affected(self, registry, client):
        registry.fail("HEAD .*/blobs/", Fault(status=503), times=None)
        assert (await client.ask(self.path))[2] == LAYER
        assert (await client.ask(self.path, method="HEAD"))[0] == 503
        registry.heal()
        assert (await client.ask(self.path, method="HEAD"))[0] == 200

    @pytest.mark.parametrize("reset", [True, False])
    @pytest.mark.parametrize("cut_at", [0, 1, 100_000, len(LAYER) - 1])
    async def test_a_body_is_cut_short(self, registry, client, cut_at, reset):
        registry.fail("/blobs/", Fault(cut_at=cut_at, reset=reset))
        with pytest.raises(aiohttp.ClientError):
            await client.ask(self.path)
        assert registry.bytes_sent("/blobs/") == cut_at

    async def test_a_body_stalls_until_released(self, registry, client):
        release = asyncio.Event()
        registry.fail("/blobs/", Fault(stall_at=1000, until=release))
        async with client.session.get(registry.url + self.path) as response:
            assert await response.content.readexactly(1000) == LAYER[:1000]
            assert registry.bytes_sent() == 1000
            release.set()
            assert await response.read() == LAYER[1000:]

    async def test_headers_are_delayed(self, registry, client):
        release = asyncio.Event()
        registry.fail("/blobs/", Fault(until_headers=release))
        async with asyncio.TaskGroup() as group:
            request = group.create_task(client.ask(self.path))
            await registry.until(lambda: registry.count("/blobs/") == 1)
            assert not request.done()
            release.set()
        assert request.result()[2] == LAYER

    async def test_a_connection_is_closed_before_the_headers(self, registry, client):
        registry.fail("/blobs/", Fault(hang_up=True), times=None)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.ask(self.path)

    async def test_a_well_formed_response_has_flipped_bits_or_missing_bytes(self, registry, client):
        registry.fail("/blobs/", Fault(flip_at=7))
        body = (await client.ask(self.path))[2]
        assert [at for at in range(len(LAYER)) if body[at] != LAYER[at]] == [7]
        registry.fail("/blobs/", Fault(keep=10))
        assert (await client.ask(self.path))[2] == LAYER[:10]

    async def test_a_range_is_ignored(self, registry, client):
        registry.fail("/blobs/", Fault(ignore_range=True))
        status, _, body = await client.ask(self.path, Range="bytes=5-")
        assert (status, body) == (200, LAYER)

    async def test_a_login_page_is_sent_instead(self, registry, client):
        registry.fail("/blobs/", HTML)
        status, answer, body = await client.ask(self.path)
        assert (status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert body.startswith(b"<!doctype html>")

    async def test_headers_are_replaced_or_omitted(self, registry, client):
        registry.fail("/blobs/", Fault(headers={"Docker-Content-Digest": None, "ETag": '"x"'}))
        headers = (await client.ask(self.path))[1].headers
        assert "Docker-Content-Digest" not in headers
        assert headers["ETag"] == '"x"'

    async def test_the_length_is_omitted(self, registry, client):
        registry.front.send_length = False
        _, answer, body = await client.ask(self.path)
        assert "Content-Length" not in answer.headers
        assert body == LAYER

    async def test_a_connection_is_throttled(self, registry, client):
        registry.throttle(len(LAYER) * 5)
        start = time.monotonic()
        await client.ask(self.path)
        assert time.monotonic() - start >= 0.15

    async def test_a_client_that_disconnects_is_noticed(self, registry, client):
        registry.fail("/blobs/", Fault(stall_at=1000, until=asyncio.Event()))
        async with client.session.get(registry.url + self.path) as response:
            await response.content.readexactly(1000)
            response.close()
        await registry.until(lambda: registry.seen("/blobs/")[0].done)
