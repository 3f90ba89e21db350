"""The tokens of the admin API: names and roles, and what the log says of their use."""

import asyncio
import io
import json
import os

import pytest

from proxy.cli.api_client import AdminClient
from proxy.config import load
from proxy.errors import ConfigError
from proxy.log import configure_logging
from proxy.server.admin.schema import load_openapi
from tests.support.program import Program


@pytest.fixture
def tokens(tmp_path):
    """The settings of a server with a token for each role, and the old one."""
    for name in ("dashboard", "deploy", "old"):
        (tmp_path / name).write_text(f"secret-of-{name}\n")
    return {
        "admin_listen": ["127.0.0.1:0"],
        "admin_token_file": str(tmp_path / "old"),
        "admin_tokens": [
            {"name": "dashboard", "file": str(tmp_path / "dashboard")},
            {"name": "deploy", "file": str(tmp_path / "deploy"), "role": "operate"},
        ],
    }


async def send(program: Program, method: str, path: str, token: str) -> tuple[int, str]:
    """Send a request with an empty document; return status and message."""
    async with program.session.request(
        method,
        f"http://{program.admin_addresses[0]}{path}",
        headers={"Authorization": f"Bearer {token}"},
        json={},
    ) as response:
        return response.status, await response.text()


async def test_a_token_with_the_role_read_permits_only_what_changes_nothing(make_program, tokens):
    program = await make_program(server=tokens)
    reading = {("POST", f"/api/v1/{name}") for name in ("images/check", "export/plan")}
    reading |= {("POST", "/api/v1/policy/check"), ("POST", "/api/v1/upstreams/check")}
    reading |= {("POST", "/api/v1/preload/list")}
    # A call to the fleet needs the role of the operation that it calls.
    reading |= {("POST", "/api/v1/fleet/call")}
    assert len(program.routes) > 15
    for method, path in program.routes:
        allowed = method == "GET" or (method, path) in reading
        status, text = await send(program, method, path, "secret-of-dashboard")
        assert (status != 403) == allowed, (method, path, status)
        if not allowed:
            assert f"the role of the token dashboard is read; {method} {path} needs" in text
        for token in ("secret-of-deploy", "secret-of-old"):
            # An empty document is invalid for most of them, but none is denied.
            assert (await send(program, method, path, token))[0] != 403


async def test_a_call_to_the_fleet_needs_the_role_of_the_operation(make_program, tokens):
    program = await make_program(server=tokens)

    async def call_fleet(method: str, path: str, token: str) -> tuple[int, str]:
        async with program.session.request(
            "POST",
            f"http://{program.admin_addresses[0]}/api/v1/fleet/call",
            headers={"Authorization": f"Bearer {token}"},
            json={"method": method, "path": path, "document": {"images": ["app:v1"]}},
        ) as response:
            return response.status, await response.text()

    for path in ("/api/v1/images/remove", "/api/v1/images/pin", "/api/v1/images/unpin"):
        status, text = await call_fleet("POST", path, "secret-of-dashboard")
        assert status == 403
        assert f"the role of the token dashboard is read; POST {path} needs operate" in text
        # It gets further with the role: to the fleet, which this program has not.
        status, text = await call_fleet("POST", path, "secret-of-deploy")
        assert status == 400
        assert "belongs to no fleet" in text


async def test_a_wrong_token_is_rejected_whatever_others_there_are(make_program, tokens):
    program = await make_program(server=tokens)
    for wrong in ("", "dashboard", "secret-of-", "secret-of-dashboardsecret-of-deploy"):
        assert (await send(program, "GET", "/api/v1/status", wrong))[0] == 401


async def test_the_log_names_the_token_or_the_process_of_a_request(
    registry, tokens, tmp_path, restore_logging
):
    program, stream = Program(tmp_path / "store", registry, server=tokens), io.StringIO()
    program.access_log = configure_logging("info", "json", stream)
    await program.start()
    await send(program, "POST", "/api/v1/images/remove", "secret-of-dashboard")
    await asyncio.to_thread(AdminClient(program.root).get, "/api/v1/status")
    await program.stop()
    await asyncio.to_thread(program.access_log.close)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [
        (line["actor"], line["status"]) for line in lines if line["event"] == "admin_request"
    ] == [("token dashboard", 403), (f"uid {os.geteuid()} pid {os.getpid()}", 200)]
    assert "secret-of" not in stream.getvalue()


def settings(*tokens: dict[str, str], **server: object) -> dict[str, object]:
    return {"server": {"admin_tokens": [*tokens], **server}}


def test_an_address_off_loopback_is_content_with_a_named_token(tmp_path):
    token = {"name": "ci", "file": str(tmp_path / "x")}
    load(None, {}, settings(token, admin_listen=["0.0.0.0:0"]))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([{"name": "a b", "file": "/x"}], "'a b' is not a name"),
        ([{"name": "a", "file": ""}], "file is empty"),
        ([{"name": "a"}], "file: is missing"),
        ([{"name": "a", "file": "/x", "role": "admin"}], "write one of read, operate"),
        ([{"name": "a", "file": "/x"}, {"name": "a", "file": "/y"}], "the name 'a' is taken"),
        ([{"name": "admin_token_file", "file": "/x"}], "'admin_token_file' is taken"),
    ],
)
def test_an_invalid_table_is_an_error_that_says_what_to_write(tokens, reason):
    with pytest.raises(ConfigError, match=reason):
        load(None, {}, settings(*tokens))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\n", "is empty"), (b"\xff", "not ASCII"), (b"same", "is the token of first too")],
)
async def test_an_unusable_token_is_an_error_that_names_its_file(
    make_program, tmp_path, content, reason
):
    (tmp_path / "first").write_text("same")
    (tmp_path / "second").write_bytes(content)
    tables = [{"name": name, "file": str(tmp_path / name)} for name in ("first", "second")]
    with pytest.raises(ConfigError, match=f"{tmp_path}/second: admin_tokens: second: .*{reason}"):
        await make_program(server={"admin_tokens": tables})


def test_the_description_of_the_api_names_the_operations_that_reading_permits():
    text = load_openapi()["components"]["securitySchemes"]["token"]["description"]
    for name in (
        "/images/check",
        "/export/plan",
        "/policy/check",
        "/preload/list",
        "/upstreams/check",
    ):
        assert name in text
