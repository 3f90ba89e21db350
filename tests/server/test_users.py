"""Logins: who may come in, what a wrong one is told, and what a flood of them costs."""

import asyncio
import subprocess
from base64 import b64encode
from pathlib import Path

import bcrypt
import pytest
from structlog.testing import capture_logs

from proxy.config import load
from proxy.errors import ConfigError
from proxy.server import access, users
from tests.fakes.peer import exchange

PASSWORD = "CANARY pass:word é"


def basic(user: str, password: str | bytes) -> str:
    given = password.encode() if isinstance(password, str) else password
    return f"Basic {b64encode(user.encode() + b':' + given).decode()}"


def htpasswd(path: Path, cost: int = 5, **people: str) -> str:
    """Write the file as an operator does."""
    path.unlink(missing_ok=True)
    for user, password in people.items():
        create = ["-c"] if not path.exists() else []
        subprocess.run(
            ["htpasswd", "-B", "-C", str(cost), "-b", *create, str(path), user, password],
            check=True,
            capture_output=True,
        )
    return str(path)


@pytest.fixture
def file(tmp_path) -> str:
    return htpasswd(tmp_path / "htpasswd", amy=PASSWORD, bob="other")


@pytest.fixture
async def guarded(make_program, file):
    return await make_program(server={"htpasswd": file})


async def test_whoever_has_a_login_pulls_and_nobody_else(registry, guarded):
    image = registry.add_image()
    target = f"/v2/{image.repository}/manifests/latest"
    assert (await guarded.ask(target, Authorization=basic("amy", PASSWORD))).status == 200
    assert (await guarded.ask(target, Authorization=basic("bob", "other"))).status == 200
    # Also when it is cached.
    for given in ("", basic("amy", "other"), basic("bob", PASSWORD), basic("eve", PASSWORD)):
        answer = await guarded.ask(target, Authorization=given)
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")


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
async def test_everything_that_clients_reach_needs_a_login(registry, guarded, target):
    answer = await exchange(guarded.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="pullcache"'
    assert registry.requests == []
    push = await guarded.ask(target, method="POST")
    assert push.status == 401


async def test_who_watches_over_the_daemon_needs_none(guarded):
    for target in ("/healthz", "/readyz", "/healthz?x"):
        assert (await guarded.ask(target)).status == 200


async def test_without_the_key_nobody_is_asked(program):
    answer = await program.ask("/v2/", Authorization="Basic nonsense")
    assert answer.status == 200
    assert "WWW-Authenticate" not in answer.headers


JUNK = {
    "nothing": "",
    "no scheme": "nonsense",
    "another scheme": "Bearer " + b64encode(b"amy:x").decode(),
    "no base64": "Basic !!!",
    "half of it": "Basic YW1",
    "not utf-8": "Basic " + b64encode(b"\xff\xfe:x").decode(),
    "a header that is not": "Basic \xff\xfe",
    "no colon": "Basic " + b64encode(b"amy").decode(),
    "no user": basic("", "x"),
    "no password": basic("amy", ""),
    "nul in the user": basic("amy\0", PASSWORD),
    "nul in the password": basic("amy", PASSWORD + "\0"),
    "a long password": basic("amy", "x" * 80),
    "the right password and more": basic("amy", PASSWORD + "x" * 72),
    "eight kilobytes": basic("amy", "x" * 5900),
    "blanks": "Basic  " + "  ",
    "a user with a line in it": basic("amy\r\nX: y", PASSWORD),
}


@pytest.mark.parametrize("name", JUNK)
async def test_c16_junk_is_refused_like_any_wrong_password(guarded, name, caplog):
    usual = await guarded.ask("/v2/", Authorization=basic("amy", "wrong"))
    request = f"GET /v2/ HTTP/1.1\r\nHost: x\r\nAuthorization: {JUNK[name]}\r\n\r\n"
    with capture_logs() as logged:
        answer = await exchange(guarded.url, request.encode("latin-1"))
    assert answer.status == 401
    assert answer.body == usual.body
    assert {key for key in answer.headers if key != "date"} == {
        key.lower() for key in usual.headers if key != "Date"
    }
    assert not [entry for entry in logged if entry.get("exc_info")]


def test_a09_a_user_who_is_not_there_costs_a_hash_like_one_who_is(file):
    passwords = users.load_htpasswd(file)
    costs = {hashed[4:6] for hashed in (*passwords.hash_by_user.values(), passwords.dummy_hash)}
    assert len(costs) == 1
    assert passwords.dummy_hash not in passwords.hash_by_user.values()


async def test_a09_every_wrong_login_is_hashed_and_a_right_one_once(guarded, monkeypatch):
    hashed = []
    real = bcrypt.checkpw

    def checkpw(password: bytes, with_hash: bytes) -> bool:
        hashed.append(with_hash)
        return bool(real(password, with_hash))

    monkeypatch.setattr(bcrypt, "checkpw", checkpw)
    for _ in range(2):
        for user in ("amy", "eve"):
            await guarded.ask("/v2/", Authorization=basic(user, "wrong"))
    assert len(hashed) == 4
    answers = [guarded.ask("/v2/", Authorization=basic("amy", PASSWORD)) for _ in range(20)]
    assert {one.status for one in await asyncio.gather(*answers)} == {200}
    assert len(hashed) == 5


@pytest.fixture
def dear(tmp_path) -> str:
    """A file whose hashes take long."""
    return htpasswd(tmp_path / "htpasswd", cost=10, amy=PASSWORD)


async def test_c17_a_flood_of_guesses_is_cut_and_who_is_known_goes_on(make_program, dear):
    program = await make_program(server={"htpasswd": dear})
    assert (await program.ask("/v2/", Authorization=basic("amy", PASSWORD))).status == 200
    flood = asyncio.gather(
        *(program.ask("/v2/", Authorization=basic("amy", f"guess {n}")) for n in range(100))
    )
    async with asyncio.timeout(20):
        assert (await program.ask("/v2/", Authorization=basic("amy", PASSWORD))).status == 200
        answers = await flood
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {401, 429}
    # What is hashed is what one client may have waiting, and not all of it.
    assert statuses.count(429) > 50
    refused = next(answer for answer in answers if answer.status == 429)
    assert refused.code == "TOOMANYREQUESTS"
    assert int(refused.headers["Retry-After"]) > 0


async def test_what_is_remembered_is_bounded_and_holds_no_password(guarded, monkeypatch):
    monkeypatch.setattr(users, "MAX_VERIFIED", 1)
    for user, password in (("amy", PASSWORD), ("bob", "other"), ("amy", PASSWORD)):
        assert (await guarded.ask("/v2/", Authorization=basic(user, password))).status == 200
    remembered = guarded.running.access._auth._verified
    assert len(remembered) == 1
    assert "CANARY" not in repr(remembered)


# The file.


async def test_a_file_that_changes_is_read_again_and_a_broken_one_is_not(
    guarded, file, monkeypatch
):
    monkeypatch.setattr(users, "FILE_CHECK_INTERVAL", -1.0)

    async def until(user: str, password: str, status: int) -> None:
        async with asyncio.timeout(10):
            while (await guarded.ask("/v2/", Authorization=basic(user, password))).status != status:
                pass

    await until("amy", PASSWORD, 200)
    await asyncio.to_thread(htpasswd, Path(file), amy="new", cid="third")
    await until("amy", PASSWORD, 401)
    await until("cid", "third", 200)
    with capture_logs() as logged:
        await asyncio.to_thread(Path(file).write_text, "amy:plain\n")
        async with asyncio.timeout(10):
            while not [line for line in logged if line["event"] == "htpasswd_reload_failed"]:
                await guarded.ask("/v2/", Authorization=basic("cid", "third"))
    assert (await guarded.ask("/v2/", Authorization=basic("cid", "third"))).status == 200


async def test_a_reload_changes_who_may_come_in(make_program, file):
    program = await make_program()
    assert (await program.ask("/v2/")).status == 200
    assert await program.reload(server={"htpasswd": file})
    assert (await program.ask("/v2/")).status == 401
    assert (await program.ask("/v2/", Authorization=basic("bob", "other"))).status == 200
    assert not await program.reload(server={"htpasswd": file + ".none"})
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
        ("", "holds no user"),
    ],
)
def test_other_hashes_are_refused_with_the_line_and_what_would_make_it(tmp_path, text, message):
    path = tmp_path / "htpasswd"
    path.write_text(text)
    config = load(None, {}, {"server": {"htpasswd": str(path)}}, is_root=False)
    with pytest.raises(ConfigError, match=rf"server\.htpasswd: .*{message}") as raised:
        access.check_files(config.server)
    assert "secret" not in str(raised.value)


def test_a_user_who_is_there_twice_is_an_error(file):
    text = Path(file).read_text()
    with pytest.raises(ConfigError, match="line 3: amy is there twice"):
        users.parse_htpasswd(text + text, "f")


# Who is told what.


async def test_a04_a_client_s_login_is_in_no_log_metric_or_file_and_goes_nowhere(
    registry, make_program, file
):
    image = registry.add_image()
    wrong = basic("amy", "CANARY-wrong")
    right = basic("amy", PASSWORD)
    with capture_logs() as logged:
        program = await make_program(server={"htpasswd": file})
        shown: list[object] = []
        for given in (wrong, right):
            for target in (f"/v2/{image.repository}/manifests/latest", "/v1/search?q=a", "/x"):
                answer = await program.ask(target, Authorization=given)
                shown += [dict(answer.headers), answer.body]
        shown.append((await program.ask("/metrics", Authorization=right)).body)
        await program.stop()
    files = [path.read_bytes() for path in program.root.rglob("*") if path.is_file()]
    text = repr([shown, logged, files, [dict(seen.headers) for seen in registry.requests]])
    assert registry.requests
    for secret in ("CANARY", wrong.split()[1], right.split()[1]):
        assert secret not in text


async def test_listening_for_other_machines_without_a_login_is_named_at_the_start(
    make_program, file
):
    with capture_logs() as logged:
        program = await make_program(server={"listen": ["0.0.0.0:0"]})
    (said,) = [line for line in logged if line["event"] == "listener_without_auth"]
    assert said["log_level"] == "warning"
    assert said["addresses"] == program.addresses
    with capture_logs() as logged:
        await make_program(root=Path(file).parent / "one", server={"listen": ["127.0.0.1:0"]})
        await make_program(
            root=Path(file).parent / "two", server={"listen": ["0.0.0.0:0"], "htpasswd": file}
        )
    events = [line["event"] for line in logged]
    assert "listener_without_auth" not in events
    assert "listener_without_tls" in events
