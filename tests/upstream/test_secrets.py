"""Secrets appear in no output and go only where they belong (faults A1 to A4, U26)."""

import json
import ssl
from base64 import b64encode
from pathlib import Path

import pytest
import trustme
from structlog.testing import capture_logs

from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

PASSWORD = "CANARY-password"
ENCODED = b64encode(f"bob:{PASSWORD}".encode()).decode()
PRIVATE = "me/private"


@pytest.fixture
def credentials(request, registry, tmp_path, monkeypatch):
    """The settings of an upstream with bob's password, from each source of credentials."""
    if request.param == "password":
        return {"username": "bob", "password": PASSWORD}
    if request.param == "password_file":
        (tmp_path / "secret").write_text(PASSWORD)
        return {"username": "bob", "password_file": str(tmp_path / "secret")}
    if request.param == "docker_config":
        server = registry.url.removeprefix("http://")
        (tmp_path / "config.json").write_text(json.dumps({"auths": {server: {"auth": ENCODED}}}))
        return {"docker_config": str(tmp_path / "config.json")}
    helper = tmp_path / "docker-credential-canary"
    helper.write_text(f'#!/bin/sh\necho \'{{"Username":"bob","Secret":"{PASSWORD}"}}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return {"credential_helper": "canary"}


FAULTS = [
    Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Basic realm="x"'}),
    Fault(status=403),
    Fault(status=429),
    Fault(status=500, body=b"<html>"),
    Fault(status=307, body=b"", headers={"Location": "http://169.254.169.254/"}),
    Fault(status=307, body=b"", headers={"Location": "http://[?x=CANARY-signature"}),
    Fault(hang_up=True),
    Fault(cut_at=10),
]
CREDENTIAL_SOURCES = ["password", "password_file", "docker_config", "credential_helper"]


@pytest.mark.parametrize("credentials", CREDENTIAL_SOURCES, indirect=True)
async def test_a04_secrets_are_in_no_response_log_metric_or_file(
    registry, make_program, tmp_path, credentials
):
    image = registry.add_image(PRIVATE)
    registry.repository(PRIVATE).private = True
    registry.tokens.users["bob"] = PASSWORD
    upstreams = {"docker.io": {"url": registry.url, **credentials}}
    output: list[object] = []
    with capture_logs() as logs:
        program = await make_program(upstreams=upstreams)
        await program.pull(image)
        for fault in FAULTS:
            registry.heal()
            registry.fail("", fault, times=None)
            for target in ("manifests/none", f"blobs/sha256:{'0' * 64}", "tags/list"):
                response = await program.ask(f"/v2/{PRIVATE}/{target}")
                output += [dict(response.headers), response.body]
        registry.heal()
        output.append((await program.ask("/metrics")).body)
        await program.stop()
    files = [path.read_bytes() for path in program.root.rglob("*") if path.is_file()]
    text = repr([output, logs, files])
    assert "upstream" in text
    assert registry.tokens._grants
    for secret in ("CANARY", ENCODED, *registry.tokens._grants):
        assert secret not in text


@pytest.mark.parametrize("credentials", CREDENTIAL_SOURCES, indirect=True)
async def test_a01_a_password_goes_only_to_the_token_server_of_the_registry(
    registry, make_program, credentials
):
    image = registry.add_image(PRIVATE)
    registry.repository(PRIVATE).private = True
    registry.tokens.users["bob"] = PASSWORD
    program = await make_program(upstreams={"docker.io": {"url": registry.url, **credentials}})
    await program.pull(image)
    requests_with_password = [
        seen for seen in registry.requests if ENCODED in repr(dict(seen.headers))
    ]
    assert {seen.target.partition("?")[0] for seen in requests_with_password} == {"/token"}


async def test_a02_no_upstream_gets_the_token_or_password_of_another(registry, make_program):
    async with FakeRegistry() as other:
        upstreams = {}
        for name, server, user in (("docker.io", registry, "bob"), ("other.test", other, "amy")):
            server.add_image(PRIVATE)
            server.repository(PRIVATE).private = True
            server.tokens.users[user] = f"CANARY-{user}"
            upstreams[name] = {
                "url": server.url,
                "username": user,
                "password": f"CANARY-{user}",
            }
        # Both use the same token server, service and scope; only user and upstream differ.
        registry.tokens.users["amy"] = "CANARY-amy"
        realm = f'Bearer realm="{registry.url}/token",service="registry.fake"'
        other.fail("/v2/", Fault(status=401, body=b"", headers={"WWW-Authenticate": realm}))
        program = await make_program(upstreams=upstreams)
        assert (await program.manifest(PRIVATE)).status == 200
        await program.ask(f"/v2/{PRIVATE}/manifests/latest?ns=other.test")
        token_requests = registry.seen("/token")
        assert len({seen.headers["Authorization"] for seen in token_requests}) == 2
        tokens = {
            id(server): {
                seen.headers["Authorization"]
                for seen in server.seen("/v2/")
                if "Authorization" in seen.headers
            }
            for server in (registry, other)
        }
        assert all(tokens.values())
        assert not set.intersection(*tokens.values())


async def test_a02_no_repository_is_requested_with_the_token_of_another(registry, program):
    names = [f"library/app{n}" for n in range(3)]
    for name in names:
        registry.add_image(name)
        for reference in ("latest", "none"):
            await program.manifest(name, reference)
    tokens = {
        name: {
            seen.headers["Authorization"]
            for seen in registry.seen(f"/v2/{name}/")
            if "Authorization" in seen.headers
        }
        for name in names
    }
    assert [len(response) for response in tokens.values()] == [1, 1, 1]
    assert len(set.union(*tokens.values())) == 3


async def test_a01_an_https_registry_may_not_name_a_token_server_without_tls(
    make_program, tmp_path
):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with FakeRegistry(tls=context) as secure, FakeRegistry() as plain:
        image = secure.add_image()
        settings = {"url": secure.url, "ca_file": str(tmp_path / "ca.pem")}
        program = await make_program(upstreams={"docker.io": settings})
        realm = {"WWW-Authenticate": f'Bearer realm="{plain.url}/token"'}
        rule = secure.fail("/v2/", Fault(status=401, body=b"", headers=realm), times=None)
        response = await program.manifest(image)
        assert (response.status, response.code) == (502, "UNKNOWN")
        assert "https" in response.json["errors"][0]["message"]
        rule.times = 0
        redirect = {"Location": f"{plain.url}/v2/library/app/manifests/latest"}
        secure.fail("/manifests/", Fault(status=307, body=b"", headers=redirect), times=None)
        response = await program.manifest(image)
        assert (response.status, response.code) == (502, "UNKNOWN")
        assert plain.requests == []


async def test_a03_private_content_is_served_to_every_client_and_under_no_other_repository(
    registry, make_program
):
    registry.tokens.users["bob"] = PASSWORD
    credentials = {"username": "bob", "password": PASSWORD}
    program = await make_program(upstreams={"docker.io": {"url": registry.url, **credentials}})
    image = registry.add_image(PRIVATE, layers=[b"secret layer"])
    registry.repository(PRIVATE).private = True
    registry.add_image("me/public")
    for authorization in ("", "Basic b3RoZXI6b3RoZXI=", "Bearer CANARY-client"):
        for digest in (image.digest, *image.blobs):
            kind = "manifests" if digest == image.digest else "blobs"
            response = await program.ask(
                f"/v2/{PRIVATE}/{kind}/{digest}", Authorization=authorization
            )
            assert (response.status, response.digest) == (200, digest)
            await program.wait_for_downloads()
            for method in ("GET", "HEAD"):
                other = await program.ask(
                    f"/v2/me/public/{kind}/{digest}", method, Authorization=authorization
                )
                assert other.status == 404
                assert b"secret" not in other.body
    # Credentials of clients are never sent to upstream.
    sent = repr([seen.headers.get("Authorization", "") for seen in registry.requests])
    assert "CANARY-client" not in sent
    assert "b3RoZXI6b3RoZXI=" not in sent
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert "Every client of the cache can pull whatever the login can" in page.read_text()


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
async def test_u26_no_credentials_follow_a_redirect_to_another_host(registry, make_program, scheme):
    image = registry.add_image()
    registry.tokens.users["bob"] = PASSWORD
    credentials = {"username": "bob", "password": PASSWORD}
    async with FakeRegistry(auth=False, cdn=False) as other_host:
        other_host.add_image()
        program = await make_program(upstreams={"docker.io": {"url": registry.url, **credentials}})
        if scheme == "Basic":
            registry.auth = False
            basic = {"WWW-Authenticate": 'Basic realm="x"'}
            registry.fail("/v2/", Fault(status=401, body=b"", headers=basic))
        assert (await program.manifest(image)).status == 200
        kinds = {"manifests": "none", "blobs": image.config, "tags": "list"}
        for kind, reference in kinds.items():
            target = f"/v2/{image.repository}/{kind}/{reference}"
            redirect = {"Location": other_host.url + target, "Set-Cookie": "session=CANARY-cookie"}
            registry.fail(target, Fault(status=307, body=b"", headers=redirect))
            await program.ask(target)
        authorizations = {seen.headers["Authorization"] for seen in registry.seen("/v2/")[1:]}
        assert {value.split(" ")[0] for value in authorizations} == {scheme}
        assert len(other_host.requests) == len(kinds)
        allowed = {"Host", "User-Agent", "Accept", "Accept-Encoding"}
        for seen in other_host.requests:
            assert set(seen.headers) <= allowed
            assert "CANARY" not in repr(dict(seen.headers))
