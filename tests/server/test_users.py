"""Users: logins are required, wrong ones rejected, and a flood of them limited."""

import asyncio
from base64 import b64encode
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import capture_logs

from proxy.concurrency import background
from proxy.config import load
from proxy.errors import ConfigError
from proxy.server.clients import access_control as access, login_queue, users
from tests.fakes.raw_client import exchange
from tests.support.htpasswd import basic_auth, write_htpasswd

PASSWORD = "CANARY pass:word é"


@pytest.fixture
def htpasswd_file(tmp_path) -> str:
    return write_htpasswd(tmp_path / "htpasswd", amy=PASSWORD, bob="other")


@pytest.fixture
async def protected(make_program, htpasswd_file):
    """A program that requires a login."""
    return await make_program(server={"htpasswd": htpasswd_file})


async def test_only_users_with_their_password_can_pull(registry, protected):
    image = registry.add_image()
    target = f"/v2/{image.repository}/manifests/latest"
    assert (await protected.ask(target, Authorization=basic_auth("amy", PASSWORD))).status == 200
    assert (await protected.ask(target, Authorization=basic_auth("bob", "other"))).status == 200
    # Although the image is cached now.
    for authorization in (
        "",
        basic_auth("amy", "other"),
        basic_auth("bob", PASSWORD),
        basic_auth("eve", PASSWORD),
    ):
        response = await protected.ask(target, Authorization=authorization)
        assert (response.status, response.code) == (401, "UNAUTHORIZED")


@pytest.mark.parametrize(
    "target",
    [
        "/v2/",
        "/v2",
        "/v2/_catalog",
        "/v2/library/app/tags/list",
        f"/v2/library/app/blobs/sha256:{'0' * 64}",
        "/v1/_ping",
        "/v1/search?q=x",
        "/metrics",
        "/",
        "/v2/../healthz",
        "//healthz",
        "/healthz/",
    ],
)
async def test_every_path_requires_a_login(registry, protected, target):
    response = await exchange(protected.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert response.status == 401
    assert response.headers["www-authenticate"] == 'Basic realm="pullcache"'
    assert registry.requests == []
    post_response = await protected.ask(target, method="POST")
    assert post_response.status == 401


async def test_health_checks_require_no_login(protected):
    for target in ("/healthz", "/readyz", "/healthz?x"):
        assert (await protected.ask(target)).status == 200


async def test_without_an_htpasswd_file_no_login_is_required(program):
    response = await program.ask("/v2/", Authorization="Basic nonsense")
    assert response.status == 200
    assert "WWW-Authenticate" not in response.headers


INVALID_AUTHORIZATIONS = {
    "nothing": "",
    "no scheme": "nonsense",
    "another scheme": "Bearer " + b64encode(b"amy:x").decode(),
    "not base64": "Basic !!!",
    "truncated base64": "Basic YW1",
    "not utf-8": "Basic " + b64encode(b"\xff\xfe:x").decode(),
    "not ascii": "Basic \xff\xfe",
    "no colon": "Basic " + b64encode(b"amy").decode(),
    "no user": basic_auth("", "x"),
    "no password": basic_auth("amy", ""),
    "nul in the user": basic_auth("amy\0", PASSWORD),
    "nul in the password": basic_auth("amy", PASSWORD + "\0"),
    "a long password": basic_auth("amy", "x" * 80),
    "the correct password and more": basic_auth("amy", PASSWORD + "x" * 72),
    "eight kilobytes": basic_auth("amy", "x" * 5900),
    "blanks": "Basic  " + "  ",
    "a user with a line in it": basic_auth("amy\r\nX: y", PASSWORD),
}


@pytest.mark.parametrize("name", INVALID_AUTHORIZATIONS)
async def test_c16_an_invalid_header_is_rejected_like_a_wrong_password(protected, name, caplog):
    wrong_password = await protected.ask("/v2/", Authorization=basic_auth("amy", "wrong"))
    request = (
        f"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: {INVALID_AUTHORIZATIONS[name]}\r\n\r\n"
    )
    with capture_logs() as logs:
        response = await exchange(protected.url, request.encode("latin-1"))
    assert response.status == 401
    assert response.body == wrong_password.body
    assert {key for key in response.headers if key != "date"} == {
        key.lower() for key in wrong_password.headers if key != "Date"
    }
    assert not [entry for entry in logs if entry.get("exc_info")]


def test_a09_an_unknown_user_costs_the_same_hash_as_a_known_one(htpasswd_file):
    loaded = users.load_htpasswd(htpasswd_file)
    hashes = [*loaded.hash_by_user.values(), loaded.dummy_hash]
    assert len({each[4:6] for each in hashes}) == 1
    assert loaded.dummy_hash not in loaded.hash_by_user.values()


async def test_a09_every_wrong_login_is_hashed_and_a_correct_one_once(protected, monkeypatch):
    checked_hashes = []
    real_checkpw = bcrypt.checkpw

    def checkpw(password: bytes, password_hash: bytes) -> bool:
        checked_hashes.append(password_hash)
        return bool(real_checkpw(password, password_hash))

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    for _ in range(2):
        for user in ("amy", "eve"):
            await protected.ask("/v2/", Authorization=basic_auth(user, "wrong"))
    assert len(checked_hashes) == 4
    responses = [
        protected.ask("/v2/", Authorization=basic_auth("amy", PASSWORD)) for _ in range(20)
    ]
    assert {each.status for each in await asyncio.gather(*responses)} == {200}
    assert len(checked_hashes) == 5


@pytest.fixture
def expensive_htpasswd_file(tmp_path) -> str:
    """A file with expensive hashes."""
    return write_htpasswd(tmp_path / "htpasswd", cost=10, amy=PASSWORD)


async def test_c17_a_flood_of_guesses_is_limited_and_verified_users_are_not_affected(
    make_program, expensive_htpasswd_file
):
    program = await make_program(server={"htpasswd": expensive_htpasswd_file})
    assert (await program.ask("/v2/", Authorization=basic_auth("amy", PASSWORD))).status == 200
    guesses = asyncio.gather(
        *(program.ask("/v2/", Authorization=basic_auth("amy", f"guess {n}")) for n in range(100))
    )
    async with asyncio.timeout(20):
        assert (await program.ask("/v2/", Authorization=basic_auth("amy", PASSWORD))).status == 200
        responses = await guesses
    statuses = [response.status for response in responses]
    assert set(statuses) == {401, 429}
    # Only as many passwords are hashed as may wait for one client.
    assert statuses.count(429) > 50
    rejected = next(response for response in responses if response.status == 429)
    assert rejected.code == "TOOMANYREQUESTS"
    assert int(rejected.headers["Retry-After"]) > 0


async def guess(program, address: str, user: str) -> list[int]:
    """Keep as many wrong logins waiting as one address may, until cancelled."""
    host, port = program.addresses[0].split(":")

    async def keep_guessing(number: int) -> None:
        for attempt in count():
            reader, writer = await asyncio.open_connection(host, int(port), local_addr=(address, 0))
            login = basic_auth(user, f"{address} {number} {attempt}")
            writer.write(f"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: {login}\r\n\r\n".encode())
            try:
                statuses.append(int((await reader.readline()).split()[1]))
            finally:
                writer.transport.abort()

    statuses: list[int] = []
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(login_queue.MAX_WAITING_PER_CLIENT):
                group.create_task(keep_guessing(number))
    except asyncio.CancelledError:
        return statuses
    return statuses


async def wait_for_flood(program, waiting: int) -> None:
    queue = program.running.access._auth._queue
    # One of them is being checked.
    while queue._new._count + 1 < waiting:  # noqa: ASYNC110 (a test looks from outside)
        await asyncio.sleep(0.01)


async def test_a_flood_of_guesses_from_twenty_addresses_shuts_out_no_user(
    make_program, expensive_htpasswd_file
):
    program = await make_program(server={"htpasswd": expensive_htpasswd_file})
    async with AsyncExitStack() as stack:
        for number in range(2, 22):
            flood = background(guess(program, f"127.0.0.{number}", "amy"))
            _ = await stack.enter_async_context(flood)
        await wait_for_flood(program, 60)
        for _ in range(3):
            answer = await program.ask("/v2/", Authorization=basic_auth("amy", PASSWORD))
            assert answer.status == 200
            program.running.access._auth._verified.clear()


async def test_a_flood_from_the_address_of_a_user_does_not_shut_the_user_out(
    make_program, expensive_htpasswd_file
):
    program = await make_program(server={"htpasswd": expensive_htpasswd_file})
    login = basic_auth("amy", PASSWORD)
    assert (await program.ask("/v2/", Authorization=login)).status == 200
    async with background(guess(program, "127.0.0.1", "eve")):
        await wait_for_flood(program, login_queue.MAX_WAITING_PER_CLIENT)
        # The login is no longer remembered, as when the htpasswd file has changed.
        program.running.access._auth._verified.clear()
        for _ in range(3):
            assert (await program.ask("/v2/", Authorization=login)).status == 200
            program.running.access._auth._verified.clear()


async def test_verified_logins_are_bounded_and_contain_no_password(protected, monkeypatch):
    monkeypatch.setattr(users, "MAX_VERIFIED", 1)
    for user, password in (("amy", PASSWORD), ("bob", "other"), ("amy", PASSWORD)):
        assert (await protected.ask("/v2/", Authorization=basic_auth(user, password))).status == 200
    verified = protected.running.access._auth._verified
    assert len(verified) == 1
    assert "CANARY" not in repr(verified)
    assert "CANARY" not in repr(protected.running.access._auth._known)


# The htpasswd file.


async def test_a_changed_file_is_reread_and_an_invalid_one_is_not_used(
    protected, htpasswd_file, monkeypatch
):
    monkeypatch.setattr(users, "FILE_CHECK_INTERVAL", -1.0)

    async def wait_for_status(user: str, password: str, status: int) -> None:
        async with asyncio.timeout(10):
            while (
                await protected.ask("/v2/", Authorization=basic_auth(user, password))
            ).status != status:
                pass

    await wait_for_status("amy", PASSWORD, 200)
    await asyncio.to_thread(write_htpasswd, Path(htpasswd_file), amy="new", cid="third")
    await wait_for_status("amy", PASSWORD, 401)
    await wait_for_status("cid", "third", 200)
    with capture_logs() as logs:
        await asyncio.to_thread(Path(htpasswd_file).write_text, "amy:plain\n")
        async with asyncio.timeout(10):
            while not [line for line in logs if line["event"] == "htpasswd_reload_failed"]:
                await protected.ask("/v2/", Authorization=basic_auth("cid", "third"))
    assert (await protected.ask("/v2/", Authorization=basic_auth("cid", "third"))).status == 200


async def test_a_reload_changes_the_users(make_program, htpasswd_file):
    program = await make_program()
    assert (await program.ask("/v2/")).status == 200
    assert await program.reload(server={"htpasswd": htpasswd_file})
    assert (await program.ask("/v2/")).status == 401
    assert (await program.ask("/v2/", Authorization=basic_auth("bob", "other"))).status == 200
    assert not await program.reload(server={"htpasswd": htpasswd_file + ".none"})
    assert (await program.ask("/v2/")).status == 401


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("amy:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=", "line 1.*htpasswd -B"),
        ("#x\n\namy:$apr1$ZjTqBB3f$IF9gdYAGlMrs2fuINjHsz.", "line 3.*htpasswd -B"),
        ("amy:rqXexS6ZhobKA", "line 1.*htpasswd -B"),
        ("amy:secret", "line 1.*htpasswd -B"),
        (f"amy:$2y$31${'a' * 53}", "cost 4 to 14"),
        ("amy", "line 1 is not user:hash"),
        (":x", "line 1 is not user:hash"),
        ("", "contains no users"),
    ],
)
def test_other_hashes_are_rejected_with_the_line_and_the_command_for_a_valid_one(
    tmp_path, text, message
):
    path = tmp_path / "htpasswd"
    path.write_text(text)
    config = load(None, {}, {"server": {"htpasswd": str(path)}}, is_root=False)
    with pytest.raises(ConfigError, match=rf"server\.htpasswd: .*{message}") as raised:
        access.check_files(config.server)
    assert "secret" not in str(raised.value)


def test_a_user_listed_twice_is_an_error(htpasswd_file):
    text = Path(htpasswd_file).read_text()
    with pytest.raises(ConfigError, match="line 3: amy is listed twice"):
        users.parse_htpasswd(text + text, "f")


# Secrets and warnings.


async def test_a04_a_clients_password_is_in_no_log_metric_or_file_and_not_sent_to_upstream(
    registry, make_program, htpasswd_file
):
    image = registry.add_image()
    wrong = basic_auth("amy", "CANARY-wrong")
    right = basic_auth("amy", PASSWORD)
    with capture_logs() as logs:
        program = await make_program(server={"htpasswd": htpasswd_file})
        output: list[object] = []
        for authorization in (wrong, right):
            for target in (f"/v2/{image.repository}/manifests/latest", "/v1/search?q=a", "/x"):
                response = await program.ask(target, Authorization=authorization)
                output += [dict(response.headers), response.body]
        output.append((await program.ask("/metrics", Authorization=right)).body)
        await program.stop()
    files = [path.read_bytes() for path in program.root.rglob("*") if path.is_file()]
    text = repr([output, logs, files, [dict(seen.headers) for seen in registry.requests]])
    assert registry.requests
    for secret in ("CANARY", wrong.split()[1], right.split()[1]):
        assert secret not in text


async def test_listening_for_other_machines_without_users_is_logged_at_the_start(
    make_program, htpasswd_file
):
    with capture_logs() as logs:
        program = await make_program(server={"listen": ["0.0.0.0:0"]})
    (warning,) = [line for line in logs if line["event"] == "listener_without_auth"]
    assert warning["log_level"] == "warning"
    assert warning["addresses"] == program.addresses
    with capture_logs() as logs:
        await make_program(
            root=Path(htpasswd_file).parent / "one", server={"listen": ["127.0.0.1:0"]}
        )
        await make_program(
            root=Path(htpasswd_file).parent / "two",
            server={"listen": ["0.0.0.0:0"], "htpasswd": htpasswd_file},
        )
    events = [line["event"] for line in logs]
    assert "listener_without_auth" not in events
    assert "listener_without_tls" in events
