"""Credentials go where they belong and nowhere else; tokens are taken with care."""

import asyncio
import json

import pytest
from yarl import URL

from proxy.errors import UpstreamError, UpstreamUnauthorizedError
from proxy.oci.reference import Tag
from proxy.upstream.auth import is_trusted_realm
from proxy.upstream.credentials import Credentials
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry

BOB = Credentials("bob", "pa:ss")
LATEST = Tag("latest")
SECRET = "me/secret"


@pytest.fixture
def private(registry: FakeRegistry) -> FakeRegistry:
    registry.add_image(SECRET)
    registry.repository(SECRET).private = True
    registry.tokens.users["bob"] = "pa:ss"
    return registry


@pytest.mark.parametrize(
    ("registry_url", "realm", "allowed"),
    [
        ("https://registry-1.docker.io", "https://auth.docker.io/token", True),
        ("https://ghcr.io", "https://ghcr.io/token", True),
        ("https://ghcr.io:443", "https://ghcr.io:8443/token", True),
        ("https://registry.gitlab.com", "https://gitlab.com/jwt/auth", True),
        ("https://registry-1.docker.io", "http://auth.docker.io/token", False),
        ("https://registry-1.docker.io", "https://auth.evil.example/token", False),
        ("https://registry-1.docker.io", "https://docker.io.evil.example/token", False),
        ("https://a.co.uk", "https://b.co.uk/token", False),
        ("https://a.github.io", "https://b.github.io/token", False),
        ("https://10.0.0.1", "https://10.0.0.2/token", False),
        ("https://10.0.0.1", "https://10.0.0.1:99/token", True),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5001/token", True),
        ("http://registry.test", "https://auth.registry.test/token", True),
        ("https://localhost", "https://registry.test/token", False),
        ("https://com", "https://com/token", True),
        ("https://x.com", "https://com/token", False),
    ],
)
def test_a01_credentials_go_to_the_site_of_the_registry_alone(registry_url, realm, allowed):
    assert is_trusted_realm(URL(registry_url), URL(realm)) is allowed


def test_a_password_is_never_in_a_representation():
    assert "pa:ss" not in repr(BOB)
    assert "pa:ss" not in f"{BOB}"


async def test_a_private_repository_is_opened_by_its_credentials(private, connect):
    upstream = await connect(private.url, credentials=BOB)
    assert await upstream.resolve(SECRET, LATEST)
    basic = [one for one in private.requests if "Basic" in one.headers.get("Authorization", "")]
    assert {one.target.partition("?")[0] for one in basic} == {"/token"}


async def test_nobody_sees_a_private_repository_without_them(private, connect):
    upstream = await connect(private.url)
    with pytest.raises(UpstreamUnauthorizedError):
        await upstream.resolve(SECRET, LATEST)


async def test_a_login_that_is_refused_is_named_as_ours_and_without_its_password(private, connect):
    upstream = await connect(private.url, credentials=Credentials("bob", "hunter2"))
    with pytest.raises(UpstreamUnauthorizedError) as caught:
        await upstream.resolve(SECRET, LATEST)
    assert str(caught.value) == (
        "the token server 127.0.0.1 refuses this cache's own login: incorrect username or password; "
        "check its username and password"
    )


async def test_a_registry_that_refuses_the_login_itself_is_named(registry, connect):
    registry.add_image()
    registry.auth = False
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=challenge), times=None)
    upstream = await connect(registry.url, credentials=BOB)
    with pytest.raises(UpstreamUnauthorizedError, match=r"^fake refuses this cache's own login; "):
        await upstream.resolve("library/app", LATEST)


@pytest.mark.parametrize(("status", "login"), [(401, None), (403, None), (403, BOB)], ids=str)
async def test_a_token_server_that_gives_none_shows_it_to_nobody(private, connect, status, login):
    """ghcr.io refuses the token where other registries refuse what it is for."""
    private.fail("/token", Fault(status=status, body=b""), times=None)
    upstream = await connect(private.url, credentials=login)
    with pytest.raises(UpstreamUnauthorizedError, match="if it is private, configure credentials"):
        await upstream.resolve(SECRET, LATEST)


async def test_a01_credentials_do_not_go_to_a_realm_elsewhere(registry, connect):
    registry.add_image()
    async with FakeRegistry() as stranger:
        realm = f'Bearer realm="{stranger.url.replace("127.0.0.1", "localhost")}/token"'
        fault = Fault(headers={"WWW-Authenticate": realm})
        registry.fail("/v2/", fault, times=None)
        upstream = await connect(registry.url, credentials=BOB)
        with pytest.raises(UpstreamError):
            await upstream.resolve("library/app", LATEST)
        assert stranger.count("/token") == 1
        assert "Authorization" not in stranger.requests[0].headers


async def test_a_registry_that_wants_basic_gets_it(registry, connect):
    registry.add_image()
    registry.auth = False
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=challenge))
    upstream = await connect(registry.url, credentials=BOB)
    assert await upstream.resolve("library/app", LATEST)
    assert registry.requests[-1].headers["Authorization"] == BOB.basic_authorization()
    assert BOB.basic_authorization() == "Basic Ym9iOnBhOnNz"


async def test_bearer_is_preferred_to_basic(registry, connect):
    registry.add_image()
    upstream = await connect(registry.url, credentials=BOB)
    registry.tokens.users["bob"] = "pa:ss"
    both = f'Basic realm="x", Bearer realm="{registry.url}/token"'
    registry.fail("/v2/", Fault(status=401, body=b"", headers={"WWW-Authenticate": both}))
    assert await upstream.resolve("library/app", LATEST)
    assert registry.requests[-1].headers["Authorization"].startswith("Bearer ")


@pytest.mark.parametrize(
    "challenge",
    [
        None,
        "",
        "Negotiate",
        "Bearer",
        'Bearer realm=""',
        'Bearer realm="ftp://x/"',
        'Bearer realm="http://user:pw@127.0.0.1/token"',
        'Bearer realm="http://["',
        'Bearer realm="/token"',
    ],
)
async def test_a_challenge_that_leads_nowhere_is_an_error(registry, upstream, challenge):
    registry.add_image()
    fault = Fault(status=401, body=b"", headers={"WWW-Authenticate": challenge})
    registry.fail("/v2/", fault, times=None)
    with pytest.raises(UpstreamError):
        await upstream.resolve("library/app", LATEST)
    assert registry.count("/v2/") <= 2


def answer(**fields: object) -> Fault:
    return Fault(status=200, body=json.dumps(fields).encode())


@pytest.mark.parametrize(
    "fault",
    [
        HTML,
        Fault(status=500, body=b""),
        Fault(status=302, body=b"", headers={"Location": "/token2"}),
        Fault(status=200, body=b""),
        Fault(status=200, body=b"[]"),
        Fault(status=200, body=b"[" * 100_000),
        Fault(status=200, body=b" " * 2_000_000),
        Fault(status=200, body=b'{"token":"\xff"}'),
        answer(),
        answer(token=""),
        answer(token=5),
        answer(token="a\r\nX-Evil: 1"),
        answer(token="a b"),
        answer(token="\u00e9"),
        Fault(hang_up=True),
        Fault(cut_at=5),
    ],
    ids=range(16),
)
async def test_u17_a_token_server_that_sends_no_token_is_an_error(registry, upstream, fault):
    registry.add_image()
    registry.fail("/token", fault, times=None)
    with pytest.raises(UpstreamError):
        await upstream.resolve("library/app", LATEST)


@pytest.mark.parametrize("field", ["token", "access_token"])
async def test_the_token_may_have_either_name(registry, upstream, field):
    registry.add_image()
    registry.auth = False
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=challenge))
    registry.fail("/token", answer(**{field: "abc"}))
    await upstream.resolve("library/app", LATEST)
    assert registry.requests[-1].headers["Authorization"] == "Bearer abc"


@pytest.mark.parametrize("lifetime", [None, 1, -1, 0, 1e99, "x", [], True, 300])
async def test_u17_any_lifetime_is_taken_for_a_sensible_one(registry, upstream, lifetime):
    registry.tokens.lifetime = lifetime
    registry.add_image()
    for _ in range(2):
        await upstream.resolve("library/app", LATEST)
    assert registry.count("/token") == 1
    (token,) = upstream._registry._authenticator._tokens.values()
    remaining = token.expires_at - asyncio.get_running_loop().time()
    assert 45 < remaining < 3600
