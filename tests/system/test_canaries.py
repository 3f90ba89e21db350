"""Secrets are nowhere but where they belong, over the whole life of a daemon (fault A4).

Every secret that there is has a value that is looked for afterwards, plain and in base64, in all that the
daemon wrote and said: log, stdout, answers, commands, metrics, store, command line. A core dump is not looked
into: it holds the memory of a process that has to know its passwords.
"""

import asyncio
import json
import os
import re
import signal
import sys
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import bcrypt
import pytest

from tests.fakes.content import Image
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry
from tests.support.certificates import Authority
from tests.system.processes import Process, fenced

WAYS = ("config", "file", "docker", "helper")
ADMIN, CLIENT, PROXY, GUESS = "CANARY-admin", "CANARY-client", "CANARY-proxy", "CANARY-guess"
REPOSITORY = "me/private"
LOGIN = "Basic " + b64encode(f"amy:{CLIENT}".encode()).decode()
RELOADED = re.compile('"event":"(?:not_)?reloaded"')
FAULTS = (
    ("/token", Fault(status=401, body=b"no")),
    ("/token", Fault(status=200, body=b'{"token": 5}')),
    ("/token", HTML),
    ("/token", Fault(status=500)),
    ("/v2/", Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Basic realm="x"'})),
    ("/v2/", Fault(status=403)),
    ("/v2/", Fault(status=307, body=b"", headers={"Location": "http://[?x=CANARY-signature"})),
    ("/v2/", Fault(hang_up=True)),
    ("/registry-v2/", Fault(status=500)),
    ("/registry-v2/", Fault(cut_at=10)),
    ("/registry-v2/", Fault(flip_at=0)),
)


def password(way: str) -> str:
    return f"CANARY-password-by-{way}"


def encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


@dataclass
class Stage:
    """A daemon with a secret of each kind, and all that anybody saw of it."""

    place: Path
    registry: FakeRegistry
    authority: Authority
    shown: dict[str, bytes] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)

    def prepare(self) -> None:
        """Write the configuration and the files that it names."""
        certificate, key = self.authority.issue("cache", "IP:127.0.0.1")
        hashed = bcrypt.hashpw(CLIENT.encode(), bcrypt.gensalt(4)).decode()
        address = self.registry.url.removeprefix("http://")
        auth = {"auths": {address: {"auth": encoded(f"docker:{password('docker')}")}}}
        helper = {"Username": "helper", "Secret": password("helper")}
        files = {
            "users": f"amy:{hashed}\n",
            "token": ADMIN,
            "password": password("file"),
            "docker.json": json.dumps(auth),
            "docker-credential-canary": f"#!/bin/sh\necho '{json.dumps(helper)}'\n",
        }
        for name, text in files.items():
            (self.place / name).write_text(text)
            (self.place / name).chmod(0o700)
        self.write_config(
            f"""\
[server]
listen = ["127.0.0.1:0"]
admin_listen = ["127.0.0.1:0"]
admin_token_file = "{self.place}/token"
htpasswd = "{self.place}/users"
tls_certificate = ["{certificate}"]
tls_key = ["{key}"]
[log]
level = "debug"
[store]
path = "{self.place}/store"
min_free = "0B"
[manifests]
ttl = "0s"
stale_if_error = "0s"
[fetch]
attempts = 2
[upstreams."docker.io"]
url = "{self.registry.url}"
username = "config"
password = "{password("config")}"
[upstreams."file"]
url = "{self.registry.url}"
username = "file"
password_file = "{self.place}/password"
[upstreams."docker"]
url = "{self.registry.url}"
docker_config = "{self.place}/docker.json"
[upstreams."helper"]
url = "{self.registry.url}"
credential_helper = "canary"
[upstreams."proxied"]
url = "http://registry.invalid"
proxy = "http://user:{PROXY}@127.0.0.1:9"
"""
        )
        logins = [f"{way}:{password(way)}" for way in WAYS] + [f"user:{PROXY}", f"amy:{CLIENT}"]
        plain = [ADMIN, CLIENT, PROXY, GUESS, "CANARY", hashed, *map(password, WAYS)]
        private = Path(key).read_text().splitlines()[1]
        self.secrets = {*plain, *map(encoded, [*plain, *logins]), private}

    def write_config(self, text: str) -> None:
        (self.place / "pullcache.toml").write_text(text)

    async def run(self, name: str, *arguments: str) -> None:
        """Run a command on the daemon, and keep what it prints."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", *arguments, "-c", str(self.place / "pullcache.toml")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=fenced(),
        )
        self.shown[name], _ = await process.communicate()

    async def ask(self, session: aiohttp.ClientSession, url: str, **headers: str) -> int:
        """Ask, and keep all of the answer."""
        async with session.get(url, headers=headers) as answer:
            try:
                body = await answer.read()
            except aiohttp.ClientPayloadError:
                body = b"cut"
            name = f"{len(self.shown)} {url} {answer.status}"
            self.shown[name] = repr([dict(answer.headers), body]).encode()
            return answer.status

    def found(self) -> list[str]:
        """Return where a secret is, of all that was shown or written."""
        written = (path for path in (self.place / "store").rglob("*") if path.is_file())
        everything = self.shown | {str(path): path.read_bytes() for path in written}
        return [
            f"{secret} in {name}"
            for name, content in everything.items()
            for secret in self.secrets
            if secret.encode() in content
        ]


@pytest.fixture
async def stage(place: Path) -> AsyncIterator[Stage]:
    async with FakeRegistry() as registry:
        registry.pull_limit = None
        for way in WAYS:
            registry.tokens.users[way] = password(way)
        registry.repository(REPOSITORY).private = True
        yield Stage(place, registry, Authority(place / "certs"))


async def live(stage: Stage, process: Process, image: Image) -> None:
    """Do all that a daemon does in its life: pulls that work and that fail, reloads, questions, a crash."""

    def announced() -> list[str]:
        return re.findall(r"https://127\.0\.0\.1:[1-9]\d*", process.out.read_text())

    url, *_ = await asyncio.to_thread(process.wait_until, announced, "its announcement")
    connector = aiohttp.TCPConnector(ssl=stage.authority.trust())
    async with aiohttp.ClientSession(connector=connector) as session:
        for way in WAYS:
            prefix = "docker.io" if way == "config" else way
            await pull_and_fail(stage, session, f"{url}/v2/{prefix}/{REPOSITORY}", image)
        await stage.ask(session, f"{url}/v2/proxied/app/manifests/1", Authorization=LOGIN)
        wrong = f"Basic {encoded(f'amy:{GUESS}')}"
        for authorization in ("", wrong, f"Bearer {GUESS}", f"Basic {GUESS}"):
            status = await stage.ask(session, f"{url}/v2/", Authorization=authorization)
            assert status == 401
        await stage.ask(session, f"{url}/metrics", Authorization=LOGIN)
        await ask_the_admin_api(stage, session)
    for command in ("config show", "config show --json", "config check", "status"):
        await stage.run(command, *command.split())
    stage.shown["command line"] = await asyncio.to_thread(read_bytes, process.pid)
    await reload(stage, process)
    process.signal(signal.SIGQUIT)
    await asyncio.to_thread(
        process.wait_until, lambda: "_keep_house" in process.err.read_text(), "the stacks of tasks"
    )
    process.signal(signal.SIGABRT)
    assert await asyncio.to_thread(process.wait) == -signal.SIGABRT


def read_bytes(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def pull_and_fail(
    stage: Stage, session: aiohttp.ClientSession, base: str, image: Image
) -> None:
    """Pull an image, and then ask while everything goes wrong upstream that can."""
    assert await stage.ask(session, f"{base}/manifests/latest", Authorization=LOGIN) == 200
    for digest in image.blobs:
        assert await stage.ask(session, f"{base}/blobs/{digest}", Authorization=LOGIN) == 200
    for match, fault in FAULTS:
        rule = stage.registry.fail(match, fault, times=None)
        for target in ("manifests/latest", f"blobs/sha256:{'0' * 64}", "tags/list"):
            await stage.ask(session, f"{base}/{target}", Authorization=LOGIN)
        rule.times = 0


async def reload(stage: Stage, process: Process) -> None:
    """Reload what is broken, near a secret, in two ways, and then what is right."""
    config = stage.place / "pullcache.toml"
    right = await asyncio.to_thread(config.read_text)
    misspelt = right.replace("password = ", "pasword = ")
    unended = right.replace(f'{password("config")}"', password("config"))
    for number, text in enumerate((misspelt, unended, right), 1):
        assert number == 3 or text != right
        stage.write_config(text)
        await stage.run(f"check {number}", "config", "check")
        process.signal(signal.SIGHUP)
        await asyncio.to_thread(
            process.wait_until,
            lambda number=number: len(RELOADED.findall(process.err.read_text())) == number,
            "the end of a reload",
        )


async def ask_the_admin_api(stage: Stage, session: aiohttp.ClientSession) -> None:
    """Ask for all that can be read, by TCP with the token, without, and with a wrong one."""
    await stage.run("api", "status", "--json")
    (admin,) = json.loads(stage.shown["api"])["admin_addresses"]
    routes = ["status", "offline", "images", "openapi.json", "search?q=app", "preload", "nothing"]
    for route in routes:
        for token in (ADMIN, GUESS, ""):
            where = f"http://{admin}/api/v1/{route}"
            await stage.ask(session, where, Authorization=f"Bearer {token}")


async def test_a04_no_secret_is_shown_over_the_whole_life_of_a_daemon(stage: Stage):
    image = stage.registry.add_image(REPOSITORY, layers=[b"layer" * 1000])
    await asyncio.to_thread(stage.prepare)
    path = f"{stage.place}:{os.environ['PATH']}"
    command = (sys.executable, "-m", "proxy", "serve", "-c", str(stage.place / "pullcache.toml"))
    process = await asyncio.to_thread(Process, stage.place, "daemon", command, env={"PATH": path})
    async with AsyncExitStack() as stack:
        stack.callback(process.kill)
        await live(stage, process, image)
    stage.shown["log"] = process.err.read_bytes()
    stage.shown["stdout"] = process.out.read_bytes()
    assert b"Fatal Python error: Aborted" in stage.shown["log"]
    # All of them were used, and the search finds them where they do belong.
    seen = repr([dict(request.headers) for request in stage.registry.requests])
    assert [way for way in WAYS if encoded(f"{way}:{password(way)}") not in seen] == []
    tokens = {*stage.registry.tokens._grants}
    assert tokens
    stage.secrets |= tokens | set(map(encoded, tokens))
    assert stage.found() == []
    stage.shown["control"] = (stage.place / "pullcache.toml").read_bytes()
    assert stage.found() != []
