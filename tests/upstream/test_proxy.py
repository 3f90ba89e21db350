"""Upstreams behind an HTTP proxy, which is configured or taken from the environment."""

import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs
from yarl import URL

from proxy.config import ProxyUrl
from proxy.errors import ConfigError, UpstreamError, UpstreamTimeoutError
from proxy.oci.reference import Tag
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.network.proxies import ProxySelector
from proxy.upstream.registry_client import RegistryTimeouts
from tests.fakes.faults import Fault
from tests.fakes.http_proxy import FakeProxy
from tests.fakes.registry import FakeRegistry
from tests.fakes.resolver import PUBLIC, FakeResolver
from tests.support.program import Program

LATEST = Tag("latest")
HUB = "docker.io"
AUTHORIZATION = "Basic " + b64encode(b"bob:CANARY@:%").decode()

MakeProgram = Callable[..., Awaitable[Program]]


class NamedRegistry(FakeRegistry):
    """A registry with names that only the proxy can resolve."""

    @property
    def url(self) -> str:
        return self.front.url.replace("127.0.0.1", "registry.test")

    @property
    def cdn_url(self) -> str:
        return self.edge.url.replace("127.0.0.1", "cdn.test")


@pytest.fixture(autouse=True)
def _no_proxy_environment(monkeypatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def proxy() -> AsyncIterator[FakeProxy]:
    """A proxy that requires no credentials."""
    async with FakeProxy() as proxy:
        yield proxy


@pytest.fixture(params=["http", "https"])
async def named_registry(request, tmp_path: Path) -> AsyncIterator[NamedRegistry]:
    """A registry behind the proxy, over http and https; `ca.pem` trusts it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("registry.test", "cdn.test").configure_cert(context)
    async with NamedRegistry(tls=context if request.param == "https" else None) as registry:
        yield registry


@pytest.fixture
def start_program(
    make_program: MakeProgram, tmp_path: Path, named_registry: NamedRegistry
) -> MakeProgram:
    """Return a function that starts the program with the registry that only the proxy can reach."""

    async def make(**settings: Any) -> Program:
        upstream = {"url": named_registry.url, "ca_file": str(tmp_path / "ca.pem"), **settings}
        return await make_program(upstreams={HUB: upstream})

    return make


def add_credentials(proxy: FakeProxy, credentials: str) -> str:
    return proxy.url.replace("http://", f"http://{credentials}@")


async def test_all_requests_go_through_the_configured_proxy(named_registry, proxy, start_program):
    image = named_registry.add_image(index=True)
    program = await start_program(proxy=proxy.url)
    await program.pull(image)
    hosts = {f"registry.test:{named_registry.front.port}", f"cdn.test:{named_registry.edge.port}"}
    if named_registry.front.tls:
        assert proxy.targets() == proxy.targets("CONNECT") == hosts
    else:
        assert {URL(target).authority for target in proxy.targets()} == hosts
        assert not proxy.targets("CONNECT")


@pytest.mark.parametrize("form", ["{}", "{}/", "bare"])
async def test_without_configuration_the_proxy_of_the_environment_is_used(
    named_registry, proxy, start_program, monkeypatch, form
):
    image = named_registry.add_image()
    address = proxy.url.removeprefix("http://") if form == "bare" else form.format(proxy.url)
    monkeypatch.setenv("HTTPS_PROXY" if named_registry.front.tls else "HTTP_PROXY", address)
    program = await start_program()
    await program.pull(image)
    assert proxy.asked


async def test_the_proxy_gets_its_credentials_and_the_registry_does_not(
    named_registry, proxy, start_program
):
    image = named_registry.add_image()
    proxy.login = AUTHORIZATION
    program = await start_program(proxy=add_credentials(proxy, "bob:CANARY%40%3A%25"))
    await program.pull(image)
    assert {each.headers["proxy-authorization"] for each in proxy.asked} == {AUTHORIZATION}
    sent = repr([dict(seen.headers) for seen in named_registry.requests])
    assert AUTHORIZATION not in sent
    assert "Proxy-" not in sent


async def test_a_proxy_that_rejects_the_credentials_is_named_as_the_reason(
    named_registry, proxy, start_program
):
    named_registry.add_image()
    proxy.login = AUTHORIZATION
    with capture_logs() as logs:
        program = await start_program(proxy=add_credentials(proxy, "bob:CANARY-wrong"))
        response = await program.manifest("library/app")
    assert (response.status, response.code) == (503, "UNAVAILABLE")
    message = response.json["errors"][0]["message"]
    assert message == "docker.io cannot be reached: its proxy rejected the credentials (407)"
    shown = repr([logs, response, program.sections, (await program.ask("/metrics")).body])
    assert "CANARY" not in shown
    assert b64encode(b"bob:CANARY-wrong").decode() not in shown
    assert not named_registry.requests


@pytest.mark.parametrize("status", [403, 502])
async def test_a_proxy_that_refuses_a_tunnel_is_named_as_the_reason(
    named_registry, proxy, start_program, status
):
    named_registry.add_image()
    proxy.status = status
    response = await (await start_program(proxy=proxy.url)).manifest("library/app")
    if named_registry.front.tls:
        assert f"its proxy responded with status {status}" in response.json["errors"][0]["message"]
        assert response.status == 503


async def test_a_proxy_that_is_down_opens_the_breaker_until_it_recovers(
    named_registry, proxy, start_program
):
    image = named_registry.add_image()
    program = await start_program(proxy=proxy.url)
    await proxy.stop()
    response = await program.manifest(image)
    message = response.json["errors"][0]["message"]
    assert (response.status, "its proxy: Connection refused" in message) == (503, True)
    while await program.metric("pullcache_upstream_up"):
        assert (await program.manifest(image)).status == 503
    await proxy.start()
    await program.wait_for_upstream()
    await program.pull(image)


async def test_a_proxy_with_an_unknown_name_is_named_as_the_reason(named_registry, start_program):
    response = await (await start_program(proxy="http://proxy.invalid:3128")).manifest(
        "library/app"
    )
    assert response.status == 503
    assert "cannot be reached: its proxy: " in response.json["errors"][0]["message"]


async def test_a_proxy_that_hangs_is_a_timeout(named_registry, proxy, connect):
    proxy.is_silent = True
    upstream = await connect(
        named_registry.url,
        proxies=ProxySelector({"ALL_PROXY": proxy.url}),
        timeouts=RegistryTimeouts(2, 5, request=0.3),
    )
    with pytest.raises(UpstreamTimeoutError):
        await upstream.resolve("library/app", LATEST)
    assert proxy.asked


async def test_a_host_in_no_proxy_is_connected_to_directly(
    named_registry, proxy, start_program, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "other.test,.test")
    response = await (await start_program(proxy=proxy.url)).manifest("library/app")
    # Without the proxy its name cannot be resolved.
    assert "docker.io cannot be reached: " in response.json["errors"][0]["message"]
    assert "proxy" not in response.json["errors"][0]["message"]
    assert proxy.asked == []


async def test_this_machine_is_connected_to_directly(registry, proxy, make_program, monkeypatch):
    image = registry.add_image()
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    program = await make_program()
    await program.pull(image)
    assert proxy.asked == []


async def test_a_mirror_on_this_machine_bypasses_the_proxy_of_the_registry(
    named_registry, registry, proxy, start_program
):
    image = registry.add_image()
    other = named_registry.add_image("library/other")
    program = await start_program(proxy=proxy.url, mirrors=[registry.url])
    await program.pull(image)
    assert proxy.asked == []
    await program.pull(other)
    assert proxy.asked


async def test_netrc_is_not_read(named_registry, proxy, start_program, monkeypatch, tmp_path):
    image = named_registry.add_image()
    lines = [f"machine {name} login bob password CANARY" for name in ("registry.test", "127.0.0.1")]
    (tmp_path / ".netrc").write_text("\n".join([*lines, "default login bob password CANARY"]))
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALL_PROXY", proxy.url)
    await (await start_program()).pull(image)
    sent = repr([[dict(seen.headers) for seen in named_registry.requests], proxy.asked])
    assert "Basic" not in sent


PRIVATE_LOCATIONS = [
    "http://10.0.0.1/",
    "http://169.254.169.254/",
    "http://[::1]/",
    "http://127.1/",
    "http://localhost:1/",
    "http://x.localhost:1/",
]


@pytest.mark.parametrize("location", PRIVATE_LOCATIONS)
async def test_a_redirect_to_a_private_address_is_rejected_behind_a_proxy_too(
    named_registry, proxy, connect, location, tmp_path
):
    if named_registry.front.tls:
        location = location.replace("http:", "https:")
    proxies = ProxySelector({"ALL_PROXY": proxy.url})
    names = FakeResolver({name: [["127.0.0.1"]] for name in ("localhost", "x.localhost")})
    tls = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    guard = EgressGuard(URL(named_registry.url), names, proxies)
    upstream = await connect(named_registry.url, proxies=proxies, guard=guard, tls=tls)
    named_registry.auth = False
    named_registry.fail(
        "/v2/", Fault(status=307, body=b"", headers={"Location": location}), times=None
    )
    with pytest.raises(UpstreamError) as caught:
        await upstream.resolve("library/app", LATEST)
    assert type(caught.value) is UpstreamError
    assert all("registry.test" in target for target in proxy.targets())
    assert proxy.asked


async def test_a_proxy_may_have_a_private_address_and_other_hosts_may_not():
    environ = {"ALL_PROXY": "http://proxy.test:3128"}
    names = {"proxy.test": [["10.0.0.1"]], "other.test": [["10.0.0.2"]], "hub.test": [[PUBLIC]]}
    guard = EgressGuard(URL("http://hub.test"), FakeResolver(names), ProxySelector(environ))
    assert await guard.resolve("proxy.test", 3128)
    for host, port in (("proxy.test", 80), ("other.test", 3128)):
        with pytest.raises(UpstreamError, match="a private"):
            await guard.resolve(host, port)


async def test_a_redirect_to_the_proxy_itself_is_rejected(proxy, connect):
    address = proxy.url.replace("127.0.0.1", "proxy.test")
    proxies = ProxySelector({"ALL_PROXY": address, "NO_PROXY": "proxy.test"})
    names = FakeResolver({"proxy.test": [["127.0.0.1"]]})
    url = "http://registry.test"
    async with NamedRegistry(auth=False) as registry:
        url = registry.url
        guard = EgressGuard(URL(url), names, proxies)
        upstream = await connect(url, proxies=proxies, guard=guard)
        fault = Fault(status=307, body=b"", headers={"Location": f"{address}/admin"})
        registry.fail("/v2/", fault, times=None)
        with pytest.raises(UpstreamError, match=r"points to proxy\.test, a proxy"):
            await upstream.resolve("library/app", LATEST)
    assert not [target for target in proxy.targets() if "admin" in target]


def select_proxy(environ: dict[str, str], url: str, proxy: str = "") -> str:
    selected = ProxySelector(environ, ProxyUrl.parse(proxy)).select(URL(url))
    return str(selected.url) if selected else ""


@pytest.mark.parametrize(
    ("environ", "url", "proxy"),
    [
        ({}, "https://hub.test", ""),
        ({"HTTP_PROXY": "p"}, "http://hub.test", "http://p"),
        ({"HTTP_PROXY": "p"}, "https://hub.test", ""),
        ({"HTTPS_PROXY": "p:1"}, "https://hub.test", "http://p:1"),
        ({"https_proxy": "p:1"}, "https://hub.test", "http://p:1"),
        ({"HTTPS_PROXY": "p:1", "https_proxy": "q:1"}, "https://hub.test", "http://p:1"),
        ({"HTTPS_PROXY": "", "https_proxy": "q:1"}, "https://hub.test", "http://q:1"),
        ({"HTTPS_PROXY": "p:1", "ALL_PROXY": "socks5://q"}, "https://hub.test", "http://p:1"),
        ({"all_proxy": "p:1"}, "http://hub.test", "http://p:1"),
        ({"ALL_PROXY": "p:1"}, "http://localhost", ""),
        ({"ALL_PROXY": "p:1"}, "http://a.localhost.:80", ""),
        ({"ALL_PROXY": "p:1"}, "http://127.0.0.2", ""),
        ({"ALL_PROXY": "p:1"}, "http://[::1]", ""),
        ({"ALL_PROXY": "p:1"}, "http://[::ffff:127.0.0.1]", ""),
        ({"ALL_PROXY": "p:1"}, "http://127.1", "http://p:1"),
    ],
)
def test_the_environment_selects_the_proxy_as_in_other_programs(environ, url, proxy):
    if environ.get("HTTPS_PROXY") and "socks5" in environ.get("ALL_PROXY", ""):
        environ = {**environ, "HTTP_PROXY": "p"}  # so that ALL_PROXY is not used, and not parsed
    assert select_proxy(environ, url).removesuffix("/") == proxy


@pytest.mark.parametrize(
    ("no_proxy", "url", "is_direct"),
    [
        ("*", "http://a.test", True),
        (" x , a.test ", "http://a.test", True),
        ("a.test", "http://b.a.test", True),
        ("a.test", "http://ba.test", False),
        ("A.Test", "http://a.test", True),
        (".a.test", "http://a.test", False),
        (".a.test", "http://b.a.test", True),
        ("*.a.test", "http://b.a.test", True),
        ("*.a.test", "http://a.test", False),
        ("a.test:80", "http://a.test", True),
        ("a.test:443", "http://a.test", False),
        ("a.test:8080", "http://a.test:8080", True),
        ("10.0.0.1", "http://10.0.0.1:5", True),
        ("10.0.0.1:6", "http://10.0.0.1:5", False),
        ("10.0.0.0/8", "http://10.9.9.9", True),
        ("10.0.0.1/8", "http://10.9.9.9", True),
        ("10.0.0.0/8", "http://11.0.0.1", False),
        ("10.0.0.0/8", "http://a.test", False),
        ("10.0.0.0/99,::/x,:80,.,,", "http://10.0.0.1", False),
        ("fd00::/8", "http://[fd00::1]", True),
        ("fd00::1", "http://[fd00::1]:5", True),
        ("[fd00::1]:5", "http://[fd00::1]:5", True),
        ("[fd00::1]:5", "http://[fd00::1]:6", False),
        ("10.0.0.0/8", "http://[::ffff:10.0.0.1]", True),
        ("a.test", "http://a.test.", True),
    ],
)
def test_no_proxy_matches_as_in_docker(no_proxy, url, is_direct):
    for name in ("NO_PROXY", "no_proxy"):
        assert select_proxy({name: no_proxy}, url, "http://p:1") == (
            "" if is_direct else "http://p:1"
        )


@pytest.mark.parametrize(
    "value",
    ["https://bob:CANARY@p", "socks5://CANARY", "http://p:99999", "http://CANARY@p/x", "p q"],
)
def test_an_invalid_proxy_of_the_environment_is_an_error_that_does_not_quote_it(value):
    with pytest.raises(ConfigError, match="HTTPS_PROXY: not a proxy URL") as caught:
        ProxySelector({"HTTPS_PROXY": value})
    assert "CANARY" not in str(caught.value)


def test_the_representation_of_a_proxy_hides_its_credentials():
    proxy = ProxySelector({}, ProxyUrl.parse("http://bob:CANARY@p:1")).select(URL("http://a.test"))
    assert proxy is not None
    assert "CANARY" not in repr(proxy)
    assert str(proxy.url) == "http://p:1"
    assert proxy.authorization.startswith("Basic ")
