"""Where an upstream's credentials come from: the configuration, docker's config.json, or a helper.

A credential helper is a program of another vendor. It gets ten seconds, bounded output, no shell,
and none of our own environment variables, which may contain passwords of other upstreams.
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

MAX_DOCKER_CONFIG = 1 << 20
MAX_HELPER_OUTPUT = 64 << 10
HELPER_TIMEOUT = 10.0
# How long a helper's credentials are used, and how long a failed helper is not run again, in
# seconds.
HELPER_TTL = 300.0
HELPER_FAILURE_TTL = 10.0

# The name of Docker Hub in docker's files, whichever host is configured.
DOCKER_HUB_SERVER = "https://index.docker.io/v1/"
_DOCKER_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})

# No slash: a helper is searched for in PATH, and nowhere else.
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERVER_ADDRESS = re.compile(r"(?:https?://)?([^/]+)(?:/(?:v[12]/?)?)?")

# The username that a helper prints with an identity token (docker's `tokenUsername`).
_IDENTITY_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Username and password for one upstream. The password is never part of `repr`."""

    username: str
    password: str

    def basic_authorization(self) -> str:
        """Return the `Authorization` value of RFC 7617."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {b64encode(pair).decode()}"

    def __repr__(self) -> str:
        return f"Credentials({self.username!r})"


class CredentialSource:
    """The credentials of one upstream: files are read at each use, helpers' output is cached."""

    def __init__(self, name: str, settings: UpstreamSettings, group: asyncio.TaskGroup) -> None:
        self._name = name
        self._settings = settings
        self._helper_runs: SingleFlight[str, Credentials] = SingleFlight(group)
        self._cache: dict[str, tuple[Credentials | ProxyError, float]] = {}
        self._now = asyncio.get_running_loop().time

    async def get(self) -> Credentials | None:
        """Return the credentials or None for anonymous; raise `UpstreamUnavailableError`."""
        try:
            return await self._get()
        except ConfigError as error:
            raise UpstreamUnavailableError(f"no credentials for {self._name}: {error}") from error

    async def _get(self) -> Credentials | None:
        settings = self._settings
        if settings.docker_config:
            server = docker_server_name(settings.url)
            found = await asyncio.to_thread(read_docker_config, settings.docker_config, server)
            return found if isinstance(found, Credentials) else await self._get_from_helper(found)
        if settings.credential_helper:
            return await self._get_from_helper(settings.credential_helper)
        if settings.password_file:
            password = await asyncio.to_thread(settings.read_password)
            return Credentials(settings.username, password)
        return Credentials(settings.username, settings.password) if settings.username else None

    async def _get_from_helper(self, helper: str) -> Credentials:
        cached, expires_at = self._cache.get(helper, (None, 0.0))
        if cached is None or expires_at <= self._now():
            return await self._helper_runs.run(helper, lambda: self._run_helper(helper))
        if isinstance(cached, ProxyError):
            raise ConfigError(str(cached))
        return cached

    async def _run_helper(self, helper: str) -> Credentials:
        try:
            server = docker_server_name(self._settings.url)
            credentials = await asyncio.to_thread(run_credential_helper, helper, server)
        except ConfigError as error:
            self._cache = {helper: (error, self._now() + HELPER_FAILURE_TTL)}
            raise
        self._cache = {helper: (credentials, self._now() + HELPER_TTL)}
        return credentials


# Docker's config.json.


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


def docker_server_name(url: str) -> str:
    """Return docker's name for the registry at `url`: host[:port], or Docker Hub's old address.

    It comes from the URL that is requested, not from the upstream's name in the configuration, so
    that credentials go to the registry that they were stored for.
    """
    server = str(url).partition("://")[2].lower()
    return DOCKER_HUB_SERVER if URL(url).host in _DOCKER_HUB_HOSTS else server


def read_docker_config(path: str, server: str) -> Credentials | str:
    """Return the credentials for `server` in docker's `config.json`, or the name of their helper.

    Raises `ConfigError`, which never contains the file's content.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MAX_DOCKER_CONFIG)
    except OSError as error:
        raise ConfigError(f"{path}: docker_config: {error.strerror}") from error
    try:
        config = msgspec.json.decode(content, type=_DockerConfig)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        # Not chained: the decoder's message may contain a secret.
        raise ConfigError(f"{path}: docker_config: is not a docker config.json") from None
    wanted = _normalize_server(server)
    helpers = {_normalize_server(name): helper for name, helper in config.cred_helpers.items()}
    if helper := helpers.get(wanted) or config.creds_store:
        return helper
    entry = config.auths.get(server) or next(
        (auth for name, auth in config.auths.items() if _normalize_server(name) == wanted), None
    )
    if entry is None:
        raise ConfigError(f"{path}: docker_config: no credentials for {server} (run docker login)")
    return _parse_docker_auth(entry, path, server)


def _parse_docker_auth(entry: _DockerAuth, path: str, server: str) -> Credentials:
    where = f"{path}: docker_config: the entry for {server}"
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
        raise ConfigError(f"{where} has no username or no password (run docker login)")
    return Credentials(username, password.rstrip("\0"))


def _normalize_server(server: str) -> str:
    """Return the host of a server's name, or the name itself if it has a path of its own."""
    match = _SERVER_ADDRESS.fullmatch(server.lower())
    host = match[1] if match else server
    return "docker.io" if host in _DOCKER_HUB_HOSTS else host


# Credential helpers (docker-credential-helpers, "Development").


class _HelperOutput(msgspec.Struct, rename="pascal"):
    username: str
    secret: str


def helper_program(name: str) -> str:
    """Return the program of the credential helper `name`, or raise `ConfigError`."""
    if _HELPER_NAME.fullmatch(name) is None:
        raise ConfigError(f"{name[:80]!r} is not a credential helper's name (for example: pass)")
    return f"docker-credential-{name}"


def run_credential_helper(
    helper: str, server: str, *, timeout: float = HELPER_TIMEOUT
) -> Credentials:
    """Return what `docker-credential-<helper> get` prints for `server`. Raises `ConfigError`.

    Blocks for up to `timeout` seconds, so it runs in a thread. Not as a subprocess of the loop:
    uvloop leaves the pipe of a program open that is killed while it prints.
    """
    program = helper_program(helper)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PULLCACHE_")
    }
    try:
        process = Popen(  # noqa: S603 (the name is validated, and there is no shell)
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
            output = _communicate(process, program, server, deadline)
            status = process.wait(deadline - time.monotonic())
        except TimeoutExpired as error:
            raise ConfigError(f"{program} did not respond within {timeout:g} s") from error
        finally:
            # The whole session: children of the helper may keep its output open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        # The output may contain secrets, so the operator has to run the helper by hand to see the
        # reason.
        raise ConfigError(f"{program} has no credentials for {server} (exit code {status})")
    return parse_helper_output(output, program)


def parse_helper_output(output: bytes, program: str) -> Credentials:
    """Return the credentials that a helper printed.

    Raises `ConfigError`, which never contains the output.
    """
    try:
        response = msgspec.json.decode(output, type=_HelperOutput)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise ConfigError(f"{program} did not print credentials") from None
    if response.username == _IDENTITY_USER:
        raise ConfigError(f"{program} holds an identity token (log in with an access token)")
    return Credentials(response.username, response.secret)


def _communicate(process: Popen[bytes], program: str, server: str, deadline: float) -> bytes:
    """Send `server` to the helper and return its output.

    Raises `TimeoutExpired` at `deadline`, and `ConfigError` if the output is too long.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(server.encode() + b"\n")
    output = bytearray()
    poller = (
        select.poll()
    )  # not select.select: a busy daemon has descriptors above its limit of 1023
    poller.register(process.stdout, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and poller.poll(left * 1000):
        chunk = process.stdout.read(MAX_HELPER_OUTPUT)
        if not chunk:
            return bytes(output)
        output += chunk
        if len(output) > MAX_HELPER_OUTPUT:
            raise ConfigError(f"{program} printed more than {MAX_HELPER_OUTPUT} bytes")
    raise TimeoutExpired(program, deadline)
