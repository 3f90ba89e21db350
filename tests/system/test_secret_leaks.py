"""A daemon never shows its secrets (fault A4).

Every secret is a canary: a unique value. After the whole life of a daemon the test searches for it,
plain and in base64, in everything that the daemon has written: log, stdout, responses, output of
commands, metrics, store, command line. Core dumps are not searched: the process has to have its
passwords in memory.
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

from tests.fakes.content import FakeImage
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry
from tests.support.certificates import Authority
from tests.system.processes import Process, isolated_environment

SOURCES = ("config", "file", "docker", "helper")  # of an upstream's credentials
ADMIN, CLIENT, PROXY, GUESS = "CANARY-admin", "CANARY-client", "CANARY-proxy", "CANARY-guess"
REPOSITORY = "me/private"
LOGIN = "Basic " + b64encode(f"amy:{CLIENT}".encode()).decode()
RELOAD_ENDED = re.compile('"event":"config_(?:reloaded|reload_failed)"')
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


def password(source: str) -> str:
    return f"CANARY-password-by-{source}"


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


@dataclass
class Scenario:
    """A daemon with a secret of each kind, and everything that it showed, by where it was shown."""

    directory: Path
    registry: FakeRegistry
    authority: Authority
    shown: dict[str, bytes] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)

    def prepare(self) -> None:
        """Write the configuration and the files that it names, and collect the secrets."""
        certificate, key = self.authority.issue("cache", "IP:127.0.0.1")
        hashed = bcrypt.hashpw(CLIENT.encode(), bcrypt.gensalt(4)).decode()
        address = self.registry.url.removeprefix("http://")
        auth = {"auths": {address: {"auth": base64(f"docker:{password('docker')}")}}}
        helper = {"Username": "helper", "Secret": password("helper")}
        files = {
            "users": f"amy:{hashed}\n",
            "token": ADMIN,
            "password": password("file"),
            "docker.json": json.dumps(auth),
            "docker-credential-canary": f"#!/bin/sh\necho '{json.dumps(helper)}'\n",
        }
        for name, text in files.items():
            (self.directory / name).write_text(text)
            (self.directory / name).chmod(0o700)
        self.write_config(
            f"""\
[server]
listen = ["127.0.0.1:0"]
admin_listen = ["127.0.0.1:0"]
admin_token_file = "{self.directory}/token"
htpasswd = "{self.directory}/users"
tls_certificate = ["{certificate}"]
tls_key = ["{key}"]
[log]
level = "debug"
[store]
path = "{self.directory}/store"
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
password_file = "{self.directory}/password"
[upstreams."docker"]
url = "{self.registry.url}"
docker_config = "{self.directory}/docker.json"
[upstreams."helper"]
url = "{self.registry.url}"
credential_helper = "canary"
[upstreams."proxied"]
url = "http://registry.invalid"
proxy = "http://user:{PROXY}@127.0.0.1:9"
"""
        )
        logins = [f"{source}:{password(source)}" for source in SOURCES]
        logins += [f"user:{PROXY}", f"amy:{CLIENT}"]
        plain = [ADMIN, CLIENT, PROXY, GUESS, "CANARY", hashed, *map(password, SOURCES)]
        private_key_line = Path(key).read_text().splitlines()[1]
        self.secrets = {*plain, *map(base64, [*plain, *logins]), private_key_line}

    def write_config(self, text: str) -> None:
        (self.directory / "pullcache.toml").write_text(text)

    async def run(self, name: str, *arguments: str) -> None:
        """Run a command on the daemon and keep its output."""
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "proxy",
                *arguments,
                "-c",
                str(self.directory / "pullcache.toml"),
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=isolated_environment(),
        )
        self.shown[name], _ = await process.communicate()

    async def send_request(self, session: aiohttp.ClientSession, url: str, **headers: str) -> int:
        """Send a request, keep the whole response and return its status."""
        async with session.get(url, headers=headers) as response:
            try:
                body = await response.read()
            except aiohttp.ClientPayloadError:
                body = b"truncated"
            name = f"{len(self.shown)} {url} {response.status}"
            self.shown[name] = repr([dict(response.headers), body]).encode()
            return response.status

    def find_leaks(self) -> list[str]:
        """Return `SECRET in PLACE` for each secret in anything that was shown or is in the store."""
        stored = (path for path in (self.directory / "store").rglob("*") if path.is_file())
        everything = self.shown | {str(path): path.read_bytes() for path in stored}
        return [
            f"{secret} in {name}"
            for name, content in everything.items()
            for secret in self.secrets
            if secret.encode() in content
        ]


@pytest.fixture
async def scenario(directory: Path) -> AsyncIterator[Scenario]:
    async with FakeRegistry() as registry:
        registry.pull_limit = None
        for source in SOURCES:
            registry.tokens.users[source] = password(source)
        registry.repository(REPOSITORY).private = True
        yield Scenario(directory, registry, Authority(directory / "certs"))


async def exercise(scenario: Scenario, process: Process, image: FakeImage) -> None:
    """Use the daemon in every way: pulls, failed pulls, logins, the admin API, reloads, a crash."""

    def find_urls() -> list[str]:
        return re.findall(r"https://127\.0\.0\.1:[1-9]\d*", process.stdout_log.read_text())

    url, *_ = await asyncio.to_thread(process.wait_until, find_urls, "its address")
    connector = aiohttp.TCPConnector(ssl=scenario.authority.trust())
    async with aiohttp.ClientSession(connector=connector) as session:
        for source in SOURCES:
            prefix = "docker.io" if source == "config" else source
            await pull_and_fail(scenario, session, f"{url}/v2/{prefix}/{REPOSITORY}", image)
        proxied = f"{url}/v2/proxied/app/manifests/1"
        await scenario.send_request(session, proxied, Authorization=LOGIN)
        wrong = f"Basic {base64(f'amy:{GUESS}')}"
        for authorization in ("", wrong, f"Bearer {GUESS}", f"Basic {GUESS}"):
            status = await scenario.send_request(session, f"{url}/v2/", Authorization=authorization)
            assert status == 401
        await scenario.send_request(session, f"{url}/metrics", Authorization=LOGIN)
        await use_admin_api(scenario, session)
    for command in ("config show", "config show --json", "config check", "status"):
        await scenario.run(command, *command.split())
    scenario.shown["command line"] = await asyncio.to_thread(read_command_line, process.pid)
    await reload(scenario, process)
    process.signal(signal.SIGQUIT)
    await asyncio.to_thread(
        process.wait_until,
        lambda: "run_maintenance" in process.stderr_log.read_text(),
        "the stacks of the tasks",
    )
    process.signal(signal.SIGABRT)
    assert await asyncio.to_thread(process.wait) == -signal.SIGABRT


def read_command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def pull_and_fail(
    scenario: Scenario, session: aiohttp.ClientSession, base: str, image: FakeImage
) -> None:
    """Pull an image, then send requests while upstream has one fault after the other."""
    url = f"{base}/manifests/latest"
    assert await scenario.send_request(session, url, Authorization=LOGIN) == 200
    for digest in image.blobs:
        url = f"{base}/blobs/{digest}"
        assert await scenario.send_request(session, url, Authorization=LOGIN) == 200
    for match, fault in FAULTS:
        rule = scenario.registry.fail(match, fault, times=None)
        for path in ("manifests/latest", f"blobs/sha256:{'0' * 64}", "tags/list"):
            await scenario.send_request(session, f"{base}/{path}", Authorization=LOGIN)
        rule.times = 0


async def reload(scenario: Scenario, process: Process) -> None:
    """Reload two configurations with an error next to a secret, and then the valid one."""
    config = scenario.directory / "pullcache.toml"
    valid = await asyncio.to_thread(config.read_text)
    unknown_key = valid.replace("password = ", "pasword = ")
    unclosed_string = valid.replace(f'{password("config")}"', password("config"))
    for number, text in enumerate((unknown_key, unclosed_string, valid), 1):
        assert number == 3 or text != valid
        scenario.write_config(text)
        await scenario.run(f"check {number}", "config", "check")
        process.signal(signal.SIGHUP)
        await asyncio.to_thread(
            process.wait_until,
            lambda number=number: (
                len(RELOAD_ENDED.findall(process.stderr_log.read_text())) == number
            ),
            "the end of a reload",
        )


async def use_admin_api(scenario: Scenario, session: aiohttp.ClientSession) -> None:
    """Request everything that the admin API serves over TCP: with the token, a wrong one, and none."""
    await scenario.run("api", "status", "--json")
    (admin,) = json.loads(scenario.shown["api"])["admin_addresses"]
    routes = ["status", "offline", "images", "openapi.json", "search?q=app", "preload", "nothing"]
    for route in routes:
        for token in (ADMIN, GUESS, ""):
            url = f"http://{admin}/api/v1/{route}"
            await scenario.send_request(session, url, Authorization=f"Bearer {token}")


async def test_a04_no_secret_is_shown_over_the_whole_life_of_a_daemon(scenario: Scenario):
    image = scenario.registry.add_image(REPOSITORY, layers=[b"layer" * 1000])
    await asyncio.to_thread(scenario.prepare)
    path = f"{scenario.directory}:{os.environ['PATH']}"
    config = scenario.directory / "pullcache.toml"
    command = (sys.executable, "-m", "proxy", "serve", "-c", str(config))
    process = await asyncio.to_thread(
        Process, scenario.directory, "daemon", command, env={"PATH": path}
    )
    async with AsyncExitStack() as stack:
        stack.callback(process.kill)
        await exercise(scenario, process, image)
    scenario.shown["log"] = process.stderr_log.read_bytes()
    scenario.shown["stdout"] = process.stdout_log.read_bytes()
    assert b"Fatal Python error: Aborted" in scenario.shown["log"]
    # The controls: upstream got all passwords, and the search finds those in the configuration.
    headers = repr([dict(request.headers) for request in scenario.registry.requests])
    unused = [one for one in SOURCES if base64(f"{one}:{password(one)}") not in headers]
    assert unused == []
    tokens = {*scenario.registry.tokens._grants}
    assert tokens
    scenario.secrets |= tokens | set(map(base64, tokens))
    assert scenario.find_leaks() == []
    scenario.shown["control"] = config.read_bytes()
    assert scenario.find_leaks() != []
