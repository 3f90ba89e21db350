"""Where an upstream's credentials come from, off the loop and within bounds.

A credential helper is a stranger's program: it gets ten seconds, its output a bound, no shell, and
none of our own environment variables, which may hold other upstreams' passwords.
"""

import asyncio
import os
import re
import select
import signal
import time
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

import msgspec
from yarl import URL

from proxy.concurrency import SingleFlight
from proxy.config import UpstreamSettings
from proxy.errors import ConfigError, ProxyError, UpstreamUnavailableError

HELPER_TIMEOUT = 10.0
MAX_HELPER_OUTPUT = 64 << 10
# How long a helper's answer is used, and how long one that failed is left alone, in seconds.
HELPER_TTL = 300.0
HELPER_FAILURE_TTL = 10.0


MAX_DOCKER_CONFIG = 1 << 20

# What docker calls Docker Hub in its files, whatever host is asked.
DOCKER_HUB_SERVER = "https://index.docker.io/v1/"
_DOCKER_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})

# A helper is a program in PATH: its name leads nowhere else.
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERVER_ADDRESS = re.compile(r"(?:https?://)?([^/]+)(?:/(?:v[12]/?)?)?")

# The user name that stands for an identity token (docker's `tokenUsername`).
_IDENTITY_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of one upstream. The password never appears in a representation."""

    username: str
    password: str

    def basic_authorization(self) -> str:
        """Return the `Authorization` value of RFC 7617."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {b64encode(pair).decode()}"

    def __repr__(self) -> str:
        return f"Credentials({self.username!r})"


class _DockerAuth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _DockerConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, _DockerAuth] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


class _HelperOutput(msgspec.Struct, rename="pascal"):
    username: str
    secret: str


def docker_server_name(url: str) -> str:
    """Return what docker calls the registry at `url`: host[:port], or Docker Hub's old address.

    It is the address that is asked, not the upstream's name here, so a login goes to no other.
    """
    server = str(url).partition("://")[2].lower()
    return DOCKER_HUB_SERVER if URL(url).host in _DOCKER_HUB_HOSTS else server


def helper_program(name: str) -> str:
    """Return the program of the credential helper `name`, or raise `ConfigError`."""
    if _HELPER_NAME.fullmatch(name) is None:
        raise ConfigError(f'{name[:80]!r} is not a credential helper\'s name (write "pass")')
    return f"docker-credential-{name}"


def read_docker_config(path: str, server: str) -> Credentials | str:
    """Return the login for `server` in docker's `config.json`, or the helper that knows it.

    Raises `ConfigError`, which never repeats what is in the file.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MAX_DOCKER_CONFIG)
    except OSError as error:
        raise ConfigError(f"{path}: docker_config: {error.strerror}") from error
    try:
        config = msgspec.json.decode(content, type=_DockerConfig)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        # Not chained: the decoder's words may hold what it could not decode.
        raise ConfigError(f"{path}: docker_config: is not a docker config.json") from None
    helpers = {_normalize_server(name): helper for name, helper in config.cred_helpers.items()}
    if helper := helpers.get(_normalize_server(server)) or config.creds_store:
        return helper
    entry = config.auths.get(server) or next(
        (
            auth
            for name, auth in config.auths.items()
            if _normalize_server(name) == _normalize_server(server)
        ),
        None,
    )
    if entry is None:
        raise ConfigError(f"{path}: docker_config: no login for {server} (docker login)")
    return _parse_docker_auth(entry, path, server)


def parse_helper_output(content: bytes, program: str) -> Credentials:
    """Return the login that a helper printed, or raise `ConfigError`, which never repeats it."""
    try:
        answer = msgspec.json.decode(content, type=_HelperOutput)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise ConfigError(f"{program} did not print a login") from None
    if answer.username == _IDENTITY_USER:
        raise ConfigError(f"{program} holds an identity token (log in with an access token)")
    return Credentials(answer.username, answer.secret)


def _parse_docker_auth(entry: _DockerAuth, path: str, server: str) -> Credentials:
    where = f"{path}: docker_config: the login for {server}"
    if entry.identitytoken or entry.registrytoken:
        raise ConfigError(f"{where} is an identity token (log in with an access token)")
    if not entry.auth:
        username, password = entry.username, entry.password
    else:
        try:
            decoded = b64decode(entry.auth, validate=True).decode()
        except ValueError:
            raise ConfigError(f"{where} is not base64") from None
        username, _, password = decoded.partition(":")
    if not username or not password:
        raise ConfigError(f"{where} has no user or no password (docker login)")
    return Credentials(username, password.rstrip("\0"))


def _normalize_server(server: str) -> str:
    """Return the host that a server's name stands for, or the name if it has a path of its own."""
    match = _SERVER_ADDRESS.fullmatch(server.lower())
    host = match[1] if match else server
    return "docker.io" if host in _DOCKER_HUB_HOSTS else host


class CredentialSource:
    """Knows one upstream's login. Files are read at each use, a helper's answers kept for minutes."""

    def __init__(self, name: str, settings: UpstreamSettings, group: asyncio.TaskGroup) -> None:
        self._name = name
        self._settings = settings
        self._helper_runs: SingleFlight[str, Credentials] = SingleFlight(group)
        self._cache: dict[str, tuple[Credentials | ProxyError, float]] = {}
        self._now = asyncio.get_running_loop().time

    async def get(self) -> Credentials | None:
        """Return the login, None for anonymous. Raises `UpstreamUnavailableError`."""
        settings = self._settings
        try:
            if settings.docker_config:
                found = await asyncio.to_thread(
                    read_docker_config, settings.docker_config, docker_server_name(settings.url)
                )
                return (
                    found if isinstance(found, Credentials) else await self._get_from_helper(found)
                )
            if settings.credential_helper:
                return await self._get_from_helper(settings.credential_helper)
            if settings.password_file:
                password = await asyncio.to_thread(settings.read_password)
                return Credentials(settings.username, password)
        except ConfigError as error:
            raise UpstreamUnavailableError(f"no login for {self._name}: {error}") from error
        return Credentials(settings.username, settings.password) if settings.username else None

    async def _get_from_helper(self, helper: str) -> Credentials:
        kept, expires = self._cache.get(helper, (None, 0.0))
        if kept is None or expires <= self._now():
            return await self._helper_runs.run(helper, lambda: self._run_helper(helper))
        if isinstance(kept, ProxyError):
            raise ConfigError(str(kept))
        return kept

    async def _run_helper(self, helper: str) -> Credentials:
        try:
            server = docker_server_name(self._settings.url)
            found = await asyncio.to_thread(run_credential_helper, helper, server)
        except ConfigError as error:
            self._cache = {helper: (error, self._now() + HELPER_FAILURE_TTL)}
            raise
        self._cache = {helper: (found, self._now() + HELPER_TTL)}
        return found


def run_credential_helper(
    helper: str, server: str, *, timeout: float = HELPER_TIMEOUT
) -> Credentials:
    """Return what `docker-credential-<helper> get` says of `server`, or raise `ConfigError`.

    Blocks for `patience` seconds at most. A thread's subprocess and not the loop's: uvloop leaves
    the pipe of a program open that is ended while it still prints.
    """
    program = helper_program(helper)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PULLCACHE_")
    }
    try:
        process = Popen(  # noqa: S603 (its name is checked, and there is no shell)
            [program, "get"],
            bufsize=0,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"{program} cannot be run: {error.strerror}") from error
    with process:
        try:
            deadline = time.monotonic() + timeout
            content = _communicate(process, program, server, deadline)
            status = process.wait(deadline - time.monotonic())
        except TimeoutExpired as error:
            raise ConfigError(f"{program} did not answer in {timeout:g} s") from error
        finally:
            # Its children too, which may hold its output open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        # What it printed may be anything: its own words are for whoever runs it by hand.
        raise ConfigError(f"{program} has no login for {server} (exit code {status})")
    return parse_helper_output(content, program)


def _communicate(process: Popen[bytes], program: str, server: str, deadline: float) -> bytes:
    """Ask, and return what is printed. Raises `TimeoutExpired`, and `ConfigError` if it is long."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(server.encode() + b"\n")
    content = bytearray()
    output = select.poll()  # select.select takes no descriptor above 1023, and there are many
    output.register(process.stdout, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and output.poll(left * 1000):
        chunk = process.stdout.read(MAX_HELPER_OUTPUT)
        if not chunk:
            return bytes(content)
        content += chunk
        if len(content) > MAX_HELPER_OUTPUT:
            raise ConfigError(f"{program} printed more than {MAX_HELPER_OUTPUT} bytes")
    raise TimeoutExpired(program, deadline)
