"""Where the admin API can be reached, and by whom."""

import asyncio
import os
import socket
import stat

import aiohttp
import pytest

from proxy.cli.api_client import AdminClient
from proxy.config import load
from proxy.errors import ConfigError, StorageError
from tests.support.program import Program

STATUS = "/api/v1/status"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return str(path)


async def ask_admin(program: Program, path: str, method: str = "GET", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"http://{program.admin_addresses[0]}{path}"
    skip = ["Content-Type"]
    async with program.session.request(
        method, url, headers=named, skip_auto_headers=skip
    ) as answer:
        return answer.status


async def test_the_socket_is_for_the_daemon_s_user_alone_from_its_first_moment(
    make_program, tmp_path
):
    before = os.umask(0)
    try:
        program = await make_program()
    finally:
        os.umask(before)
    mode = (program.root / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_the_socket_goes_with_the_daemon(program):
    assert (program.root / "admin.sock").exists()
    await program.stop()
    assert not (program.root / "admin.sock").exists()


async def test_p13_the_socket_of_a_killed_daemon_is_replaced(make_program, tmp_path):
    root = tmp_path / "store"
    root.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(root / "admin.sock"))
    program = await make_program(root)
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://localhost{STATUS}") as answer,
    ):
        assert answer.status == 200


async def test_what_is_in_the_socket_s_place_is_named(make_program, tmp_path):
    (tmp_path / "store" / "admin.sock").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"admin\.sock cannot be used"):
        await make_program(tmp_path / "store")


async def test_a_store_may_have_a_long_path(make_program, tmp_path):
    root = tmp_path / ("d" * 100) / ("e" * 100)
    root.mkdir(parents=True)
    program = await make_program(root)
    assert (await asyncio.to_thread(AdminClient(program.root).get, STATUS))["state"] == "serving"


async def test_clients_of_images_do_not_reach_it(program):
    for method in ("GET", "PUT", "POST", "DELETE"):
        for path in (STATUS, "/api/v1/offline", "/api/v1/openapi.json"):
            assert (await program.ask(path, method)).status in (404, 405)
    assert (await program.ask(STATUS)).code == "NAME_UNKNOWN"


async def test_health_and_metrics_are_there_too(make_program, token_file):
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"], "admin_token_file": token_file}
    )
    for path in ("/healthz", "/readyz", "/metrics"):
        assert await ask_admin(program, path) == 200
        assert (await program.ask(path)).status == 200


async def test_a08_by_tcp_the_token_is_wanted(make_program, token_file):
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"], "admin_token_file": token_file}
    )
    assert await ask_admin(program, STATUS) == 401
    for wrong in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer ", "s3cret"):
        assert await ask_admin(program, STATUS, Authorization=wrong) == 401
    assert await ask_admin(program, STATUS, Authorization="Bearer s3cret") == 200
    # Who has the token may come by any name: browsers do not send it for a foreign page.
    foreign = {"Host": "cache.example", "Origin": "https://a.example"}
    assert await ask_admin(program, STATUS, Authorization="bearer s3cret", **foreign) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_a06_without_a_token_no_web_page_gets_in(make_program, headers, status):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    assert await ask_admin(program, STATUS, **headers) == status


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 404),
        ("application/octet-stream", 404),
        ("text/plain", 400),
        ("Text/Plain; charset=utf-8", 400),
        ("application/x-www-form-urlencoded", 400),
        (None, 400),
    ],
)
async def test_a06_without_a_token_no_form_gets_in(make_program, kind, status):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    headers = {"Content_Type": kind} if kind else {}
    assert await ask_admin(program, "/api/v1/nothing", "POST", **headers) == status


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "cache:0"])
def test_a08_off_loopback_a_token_is_wanted_before_the_start(address, token_file):
    values = {"server": {"admin_listen": ["127.0.0.1:0", address]}}
    with pytest.raises(ConfigError, match="set admin_token_file"):
        load(None, {}, values)
    values["server"]["admin_token_file"] = token_file
    load(None, {}, values)


@pytest.mark.parametrize(
    ("content", "says"), [(b"\n", "is empty"), (b"\xff", "not ASCII"), (None, "No such file")]
)
async def test_a_token_that_cannot_be_had_is_an_error_that_names_its_file(
    make_program, tmp_path, content, says
):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}: admin_token_file: .*{says}"):
        await make_program(server={"admin_token_file": str(path)})


async def test_an_address_in_use_is_an_error_that_names_it(program, make_program, tmp_path):
    address = program.url.removeprefix("http://")
    settings = {"admin_listen": [address]}
    with pytest.raises(ConfigError, match=rf"server\.admin_listen: {address} cannot be used"):
        await make_program(tmp_path / "other", server=settings)
    assert not (tmp_path / "other" / "admin.sock").exists()
