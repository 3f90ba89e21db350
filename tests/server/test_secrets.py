"""Secrets are shown nowhere (A4), and go to nobody but whom they are for (A1, A2, U26)."""

import json
from base64 import b64encode

import pytest
from structlog.testing import capture_logs

from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry

PASSWORD = "CANARY-password"
ENCODED = b64encode(f"bob:{PASSWORD}".encode()).decode()
PRIVATE = "me/private"


@pytest.fixture
def login(request, registry, tmp_path, monkeypatch):
    """Return the settings that give bob's password, by each way there is."""
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
ALL_WAYS = ["password", "password_file", "docker_config", "credential_helper"]


@pytest.mark.parametrize("login", ALL_WAYS, indirect=True)
async def test_a04_secrets_are_in_no_answer_log_metric_or_file(
    registry, make_program, tmp_path, login
):
    image = registry.add_image(PRIVATE)
    registry.repository(PRIVATE).private = True
    registry.tokens.users["bob"] = PASSWORD
    upstreams = {"docker.io": {"url": registry.url, **login}}
    shown: list[object] = []
    with capture_logs() as logs:
        program = await make_program(upstreams=upstreams)
        await program.pull(image)
        for fault in FAULTS:
            registry.heal()
            registry.fail("", fault, times=None)
            for target in ("manifests/none", f"blobs/sha256:{'0' * 64}", "tags/list"):
                answer = await program.ask(f"/v2/{PRIVATE}/{target}")
                shown += [dict(answer.headers), answer.body]
        registry.heal()
        shown.append((await program.ask("/metrics")).body)
        await program.stop()
    files = [path.read_bytes() for path in program.root.rglob("*") if path.is_file()]
    text = repr([shown, logs, files])
    assert "upstream" in text
    assert registry.tokens._grants
    for secret in ("CANARY", ENCODED, *registry.tokens._grants):
        assert secret not in text


@pytest.mark.parametrize("login", ALL_WAYS, indirect=True)
async def test_a01_a_password_goes_to_the_token_server_of_the_registry_and_nowhere_else(
    registry, make_program, login
):
    image = registry.add_image(PRIVATE)
    registry.repository(PRIVATE).private = True
    registry.tokens.users["bob"] = PASSWORD
    program = await make_program(upstreams={"docker.io": {"url": registry.url, **login}})
    await program.pull(image)
    told = [seen for seen in registry.requests if ENCODED in repr(dict(seen.headers))]
    assert {seen.target.partition("?")[0] for seen in told} == {"/token"}


async def test_a02_no_upstream_is_told_anothers_token_or_password(registry, make_program):
    async with FakeRegistry() as other:
        users = {"bob": (registry, "CANARY-bob"), "amy": (other, "CANARY-amy")}
        upstreams = {}
        for name, (user, (one, password)) in zip(
            ("docker.io", "other.test"), users.items(), strict=True
        ):
            one.add_image(PRIVATE)
            one.repository(PRIVATE).private = True
            one.tokens.users[user] = password
            upstreams[name] = {"url": one.url, "username": user, "password": password}
        # Both name one token server, service and scope: only user and upstream differ.
        registry.tokens.users["amy"] = "CANARY-amy"
        realm = f'Bearer realm="{registry.url}/token",service="registry.fake"'
        other.fail("/v2/", Fault(status=401, body=b"", headers={"WWW-Authenticate": realm}))
        program = await make_program(upstreams=upstreams)
        assert (await program.manifest(PRIVATE)).status == 200
        await program.ask(f"/v2/{PRIVATE}/manifests/latest?ns=other.test")
        asked = registry.seen("/token")
        assert len({seen.headers["Authorization"] for seen in asked}) == 2
        tokens = {
            id(one): {
                seen.headers["Authorization"]
                for seen in one.seen("/v2/")
                if "Authorization" in seen.headers
            }
            for one in (registry, other)
        }
        assert all(tokens.values())
        assert not set.intersection(*tokens.values())
