"""Credentials go only where they belong, and tokens are validated."""

import asyncio
import json
from typing import Any

import pytest
from yarl import URL

from proxy.errors import UpstreamError, UpstreamUnauthorizedError
from proxy.oci.reference import Tag
from proxy.upstream.auth.credentials import Credentials
from proxy.upstream.auth.tokens import is_trusted_realm
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry

BOB = Credentials("bob", "pa:ss")
LATEST = Tag("latest")
SECRET = "me/secret"


@pytest.fixture
def private_registry(registry: FakeRegistry) -> FakeRegistry:
    """A registry with the private repository `SECRET`, for `BOB`."""
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
def test_a01_credentials_go_only_to_the_domain_of_the_registry(registry_url, realm, allowed):
    assert is_trusted_realm(URL(registry_url), URL(realm)) is allowed


def test_the_representation_of_credentials_hides_the_password():
    assert "pa:ss" not in repr(BOB)
    assert "pa:ss" not in f"{BOB}"


async def test_credentials_give_access_to_a_private_repository(private_registry, connect):
    upstream = await connect(private_registry.url, credentials=BOB)
    assert await upstream.resolve(SECRET, LATEST)
    basic = [
        seen
        for seen in private_registry.requests
        if "Basic" in seen.headers.get("Authorization", "")
    ]
    assert {seen.target.partition("?")[0] for seen in basic} == {"/token"}


async def test_without_credentials_a_private_repository_is_denied(private_registry, connect):
    upstream = await connect(private_registry.url)
    with pytest.raises(UpstreamUnauthorizedError):
        await upstream.resolve(SECRET, LATEST)


async def test_rejected_credentials_are_reported_without_the_password(private_registry, connect):
    upstream = await connect(private_registry.url, credentials=Credentials("bob", "hunter2"))
    with pytest.raises(UpstreamUnauthorizedError) as caught:
        await upstream.resolve(SECRET, LATEST)
    assert str(caught.value) == (
        "the token server 127.0.0.1 rejected the configured credentials: "
        "incorrect username or password; check username and password"
    )


async def test_a_registry_that_rejects_basic_credentials_is_named(registry, connect):
    registry.add_image()
    registry.auth = False
    challenge = {"WWW-Authenticate": 'Basic realm="x"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=challenge), times=None)
    upstream = await connect(registry.url, credentials=BOB)
    with pytest.raises(
        UpstreamUnauthorizedError, match=r"^fake rejected the configured credentials; "
    ):
        await upstream.resolve("library/app", LATEST)


@pytest.mark.parametrize(("status", "credentials"), [(401, None), (403, None), (403, BOB)], ids=str)
async def test_a_token_server_that_refuses_a_token_denies_access(
    private_registry, connect, status, credentials
):
    """ghcr.io refuses the token where other registries refuse the request made with it."""
    private_registry.fail("/token", Fault(status=status, body=b""), times=None)
    upstream = await connect(private_registry.url, credentials=credentials)
    with pytest.raises(UpstreamUnauthorizedError, match="if it is private, configure credentials"):
        await upstream.resolve(SECRET, LATEST)


async def test_a01_credentials_are_not_sent_to_a_token_server_of_another_domain(registry, connect):
    registry.add_image()
    async with FakeRegistry() as other_server:
        realm = f'Bearer realm="{other_server.url.replace("127.0.0.1", "localhost")}/token"'
        fault = Fault(headers={"WWW-Authenticate": realm})
        registry.fail("/v2/", fault, times=None)
        upstream = await connect(registry.url, credentials=BOB)
        with pytest.raises(UpstreamError):
            await upstream.resolve("library/app", LATEST)
        assert other_server.count("/token") == 1
        assert "Authorization" not in other_server.requests[0].headers


async def test_a_basic_challenge_is_answered_with_basic(registry, connect):
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
async def test_an_unusable_challenge_is_an_error(registry, upstream, challenge):
    registry.add_image()
    fault = Fault(status=401, body=b"", headers={"WWW-Authenticate": challenge})
    registry.fail("/v2/", fault, times=None)
    with pytest.raises(UpstreamError):
        await upstream.resolve("library/app", LATEST)
    assert registry.count("/v2/") <= 2


def token_response(**fields: object) -> Fault:
    return Fault(status=200, body=json.dumps(fields).encode())


@pytest.mark.parametrize(
    "fault",
    [
        HTML,
        Fault(status=500, body=b""),
        Fault(status=302, body=b"", headers={"Location": "/token"}),
        Fault(status=302, body=b"", headers={"Location": "/nothing"}),
        Fault(status=302, body=b"", headers={"Location": "file:///etc/passwd"}),
        Fault(status=302, body=b""),
        Fault(status=200, body=b""),
        Fault(status=200, body=b"[]"),
        Fault(status=200, body=b"[" * 100_000),
        Fault(status=200, body=b" " * 2_000_000),
        Fault(status=200, body=b'{"token":"\xff"}'),
        token_response(),
        token_response(token=""),
        token_response(token=5),
        token_response(token="a\r\nX-Evil: 1"),
        token_response(token="a\x7fb"),
        token_response(token="x" * 70_000),
        token_response(token=None, access_token=None),
        token_response(token=["a"], access_token=None),
        Fault(status=200, body=b'{"token":"\\ud800"}'),
        Fault(hang_up=True),
        Fault(cut_at=5),
    ],
    ids=range(22),
)
async def test_u17_a_token_server_that_sends_no_valid_token_is_an_error(registry, upstream, fault):
    registry.add_image()
    registry.fail("/token", fault, times=None)
    with pytest.raises(UpstreamError):
        await upstream.resolve("library/app", LATEST)


@pytest.mark.parametrize(
    "fields",
    [
        {"token": "abc"},
        {"access_token": "abc"},
        {"token": None, "access_token": "abc"},
        {"token": "", "access_token": "abc"},
        {"Token": "abc"},
        {"Access_Token": "abc", "Expires_In": 60},
        {"token": "abc", "access_token": None, "expires_in": None},
        {"token": "abc", "access_token": 5, "issued_at": 7, "scope": None, "refresh_token": []},
    ],
)
async def test_the_token_may_be_in_either_field(registry, upstream, fields):
    assert await sent_authorization(registry, upstream, token_response(**fields)) == "Bearer abc"


@pytest.mark.parametrize(
    "token",
    ["a:b", "a|b", "{a}", "a b", '"a"', "a,b;c=d", "\u00e9", "x" * 20_000, "a%20b", "a$@!b"],
)
async def test_a_token_may_have_any_characters_but_controls(registry, upstream, token):
    sent = await sent_authorization(registry, upstream, token_response(token=token))
    assert sent.encode("utf-8", "surrogateescape").decode() == f"Bearer {token}"


async def sent_authorization(registry: FakeRegistry, upstream: Any, answer: Fault) -> str:
    """Return what a registry receives after its token server has given this answer."""
    registry.add_image()
    registry.auth = False
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.fail("/v2/", Fault(status=401, body=b"", headers=challenge))
    registry.fail("/token", answer)
    await upstream.resolve("library/app", LATEST)
    return str(registry.requests[-1].headers["Authorization"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_token_server_may_redirect(private_registry, connect, status):
    registry = private_registry
    upstream = await connect(registry.url, credentials=BOB)
    scope = f"/token?service=registry.fake&scope=repository:{SECRET}:pull"
    for target in ("/token?hop=1", f"{registry.url}{scope}"):
        fault = Fault(status=status, body=b"", headers={"Location": target})
        registry.fail("/token", fault)
    assert await upstream.resolve(SECRET, LATEST)
    assert registry.count("/token") == 3


async def test_a01_a_redirect_takes_credentials_to_no_other_domain(private_registry, connect):
    async with FakeRegistry() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        fault = Fault(status=307, body=b"", headers={"Location": f"{elsewhere}/token"})
        private_registry.fail("/token", fault)
        upstream = await connect(private_registry.url, credentials=BOB)
        with pytest.raises(UpstreamError):
            await upstream.resolve(SECRET, LATEST)
        assert "Authorization" in private_registry.seen("/token")[0].headers
        assert other.count("/token") == 1
        assert "Authorization" not in other.requests[0].headers


async def test_u25_a_redirect_loop_of_a_token_server_ends(registry, upstream):
    registry.add_image()
    loop = Fault(status=302, body=b"", headers={"Location": "/token"})
    registry.fail("/token", loop, times=None)
    with pytest.raises(UpstreamError, match="did not send a token"):
        await upstream.resolve("library/app", LATEST)
    assert registry.count("/token") <= 10


@pytest.mark.parametrize("lifetime", [None, 1, -1, 0, 1e99, "x", [], True, 300])
async def test_u17_the_lifetime_of_a_token_is_clamped(registry, upstream, lifetime):
    registry.tokens.lifetime = lifetime
    registry.add_image()
    for _ in range(2):
        await upstream.resolve("library/app", LATEST)
    assert registry.count("/token") == 1
    token = upstream._registry._authenticator._get_token("library/app")
    remaining = token.expires_at - asyncio.get_running_loop().time()
    assert 45 < remaining < 3600
