"""The addresses of the admin API, and which requests it accepts."""

import asyncio
import os
import socket
import stat

import aiohttp
import pytest

from proxy.cli.api_client import AdminClient
from proxy.config import load
from proxy.errors import AddressUnavailableError, ConfigError, StorageError
from tests.fakes.raw_client import exchange
from tests.support.program import Program

STATUS = "/api/v1/status"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return str(path)


async def admin_status(program: Program, path: str, method: str = "GET", **headers: str) -> int:
    header_fields = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"http://{program.admin_addresses[0]}{path}"
    skip_headers = ["Content-Type"]
    async with program.session.request(
        method, url, headers=header_fields, skip_auto_headers=skip_headers
    ) as response:
        return response.status


async def test_only_the_daemons_user_can_connect_to_the_socket_from_the_start(
    make_program, tmp_path
):
    old_umask = os.umask(0)
    try:
        program = await make_program()
    finally:
        os.umask(old_umask)
    mode = (program.root / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_the_socket_is_removed_when_the_daemon_stops(program):
    assert (program.root / "admin.sock").exists()
    await program.stop()
    assert not (program.root / "admin.sock").exists()


async def test_p13_the_socket_of_a_killed_daemon_is_replaced(make_program, tmp_path):
    root = tmp_path / "store"
    root.mkdir()
    with socket.socket(socket.AF_UNIX) as stale_socket:
        stale_socket.bind(str(root / "admin.sock"))
    program = await make_program(root)
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://localhost{STATUS}") as response,
    ):
        assert response.status == 200


async def test_a_directory_in_place_of_the_socket_is_an_error_that_names_it(make_program, tmp_path):
    (tmp_path / "store" / "admin.sock").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"admin\.sock cannot be used"):
        await make_program(tmp_path / "store")


async def test_a_store_may_have_a_long_path(make_program, tmp_path):
    root = tmp_path / ("d" * 100) / ("e" * 100)
    root.mkdir(parents=True)
    program = await make_program(root)
    assert (await asyncio.to_thread(AdminClient(program.root).get, STATUS))["state"] == "serving"


async def test_registry_clients_cannot_reach_the_admin_api(program):
    for method in ("GET", "PUT", "POST", "DELETE"):
        for path in (STATUS, "/api/v1/offline", "/api/v1/openapi.json"):
            assert (await program.ask(path, method)).status in (404, 405)
    assert (await program.ask(STATUS)).code == "NAME_UNKNOWN"


async def test_health_and_metrics_need_no_token(make_program, token_file):
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"], "admin_token_file": token_file}
    )
    for path in ("/healthz", "/readyz", "/metrics"):
        assert await admin_status(program, path) == 200
        assert (await program.ask(path)).status == 200


async def test_a08_over_tcp_the_token_is_required(make_program, token_file):
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"], "admin_token_file": token_file}
    )
    assert await admin_status(program, STATUS) == 401
    for invalid in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer ", "s3cret"):
        assert await admin_status(program, STATUS, Authorization=invalid) == 401
    assert await admin_status(program, STATUS, Authorization="Bearer s3cret") == 200
    # With the token any Host and Origin are accepted: browsers do not send it for other sites.
    foreign_headers = {"Host": "cache.example", "Origin": "https://a.example"}
    assert (
        await admin_status(program, STATUS, Authorization="bearer s3cret", **foreign_headers) == 200
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "rebinding.example"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "192.0.2.1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_a06_without_a_token_web_pages_are_rejected(make_program, headers, status):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    assert await admin_status(program, STATUS, **headers) == status


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 404),
        ("application/octet-stream", 404),
        ("text/plain", 400),
        ("Text/Plain; charset=utf-8", 400),
        ("application/x-www-form-urlencoded", 400),
        (None, 400),
    ],
)
async def test_a06_without_a_token_web_forms_are_rejected(make_program, content_type, status):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    headers = {"Content_Type": content_type} if content_type else {}
    assert await admin_status(program, "/api/v1/nothing", "POST", **headers) == status


@pytest.mark.parametrize("address", ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "cache:0"])
def test_a08_addresses_off_loopback_require_a_token(address, token_file):
    values = {"server": {"admin_listen": ["127.0.0.1:0", address]}}
    with pytest.raises(ConfigError, match="set admin_token_file"):
        load(None, {}, values)
    values["server"]["admin_token_file"] = token_file
    load(None, {}, values)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\n", "is empty"), (b"\xff", "not ASCII"), (None, "No such file")]
)
async def test_an_unreadable_token_is_an_error_that_names_its_file(
    make_program, tmp_path, content, reason
):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}: admin_token_file: .*{reason}"):
        await make_program(server={"admin_token_file": str(path)})


async def test_an_address_in_use_is_an_error_that_names_it(program, make_program, tmp_path):
    address = program.url.removeprefix("http://")
    settings = {"admin_listen": [address]}
    with pytest.raises(
        AddressUnavailableError, match=rf"server\.admin_listen: {address} cannot be used"
    ):
        await make_program(tmp_path / "other", server=settings)
    assert not (tmp_path / "other" / "admin.sock").exists()


METRICS_HOSTS = [
    ("127.0.0.1", 200),
    ("127.0.0.1:9000", 200),
    ("[::1]:9000", 200),
    ("192.0.2.7", 200),
    ("localhost:9000", 200),
    ("LOCALHOST.", 200),
    ("cache.internal:9000", 200),
    ("Cache.Internal", 200),
    ("rebinding.example", 403),
    ("rebinding.example:9000", 403),
    ("127.0.0.1.nip.io", 403),
    ("cache.internal.evil.example", 403),
    ("evil.localhost.example", 403),
    ("", 403),
]


@pytest.mark.parametrize(("host", "status"), METRICS_HOSTS)
@pytest.mark.parametrize("has_token", [True, False])
async def test_l05_metrics_are_not_served_under_the_name_of_a_web_page(
    make_program, token_file, host, status, has_token
):
    token = {"admin_token_file": token_file} if has_token else {}
    program = await make_program(
        server={
            "admin_listen": ["127.0.0.1:0"],
            "admin_hosts": ["cache.internal"],
            **token,
        }
    )
    for path in ("/metrics", "/metrics?x=1"):
        assert await admin_status(program, path, Host=host) == status
    if has_token:
        assert (
            await admin_status(program, "/metrics", "GET", Host=host, Authorization="Bearer s3cret")
            == 200
        )
        assert (
            await admin_status(
                program, "/metrics", "GET", Host="evil.example", Authorization="Bearer wrong"
            )
            == 403
        )
    for path in ("/healthz", "/readyz"):
        assert await admin_status(program, path, Host=host) == 200


async def test_l04_browsers_guess_no_content_types(make_program, token_file, registry):
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"], "admin_token_file": token_file}
    )
    image = registry.add_image()
    admin = f"http://{program.admin_addresses[0]}"
    paths = [
        *("/v2/", "/v2/_catalog", "/v1/_ping", "/v1/search?q=a", "/metrics", "/healthz", "/readyz"),
        *(f"/v2/{image.repository}/{rest}" for rest in ("manifests/latest", "tags/list")),
        *(f"/v2/{image.repository}/blobs/{digest}" for digest in image.blobs),
        f"/v2/{image.repository}/referrers/{image.digest}",
        *("/", "/none", "/v2/none/../x", "/v2/me/app/manifests/none"),
        *("/api/v1/status", "/api/v1/offline", "/api/v1/none"),
    ]
    for base in (program.url, admin):
        for path in paths:
            for method in ("GET", "HEAD", "POST"):
                for headers in ({}, {"Authorization": "Bearer s3cret"}, {"Range": "bytes=0-0"}):
                    async with program.session.request(
                        method, base + path, headers=headers
                    ) as response:
                        await response.read()
                        assert response.headers["X-Content-Type-Options"] == "nosniff", path
    assert b"nosniff" in (await exchange(program.url, b"no HTTP\r\n\r\n")).data
    assert b"nosniff" in (await exchange(admin, b"no HTTP\r\n\r\n")).data
