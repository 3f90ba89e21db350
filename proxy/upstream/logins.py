"""Who we are to an upstream: credentials, and where docker keeps them. Reads no network.

Formats: `config.json` and the credential helpers' answers, as docker's `cli/config` writes and
reads them.
"""

import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

import msgspec
from yarl import URL

from proxy.errors import ConfigError

MAX_DOCKER_CONFIG = 1 << 20

# What docker calls Docker Hub in its files, whatever host is asked.
HUB_SERVER = "https://index.docker.io/v1/"
_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})

# A helper is a program in PATH: its name leads nowhere else.
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERVER = re.compile(r"(?:https?://)?([^/]+)(?:/(?:v[12]/?)?)?")

# The user name that stands for an identity token (docker's `tokenUsername`).
_IDENTITY = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of one upstream. The password never appears in a representation."""

    username: str
    password: str

    def basic(self) -> str:
        """Return the `Authorization` value of RFC 7617."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {b64encode(pair).decode()}"

    def __repr__(self) -> str:
        return f"Credentials({self.username!r})"


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _DockerConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, _Auth] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


class _HelperAnswer(msgspec.Struct, rename="pascal"):
    username: str
    secret: str


def server_of(url: str) -> str:
    """Return what docker calls the registry at `url`: host[:port], or Docker Hub's old address.

    It is the address that is asked, not the upstream's name here, so a login goes to no other.
    """
    server = str(url).partition("://")[2].lower()
    return HUB_SERVER if URL(url).host in _HUB_HOSTS else server


def helper_program(name: str) -> str:
    """Return the program of the credential helper `name`, or raise `ConfigError`."""
    if _HELPER.fullmatch(name) is None:
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
    helpers = {_plain(name): helper for name, helper in config.cred_helpers.items()}
    if helper := helpers.get(_plain(server)) or config.creds_store:
        return helper
    entry = config.auths.get(server) or next(
        (auth for name, auth in config.auths.items() if _plain(name) == _plain(server)), None
    )
    if entry is None:
        raise ConfigError(f"{path}: docker_config: no login for {server} (docker login)")
    return _login(entry, path, server)


def parse_helper_answer(content: bytes, program: str) -> Credentials:
    """Return the login that a helper printed, or raise `ConfigError`, which never repeats it."""
    try:
        answer = msgspec.json.decode(content, type=_HelperAnswer)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise ConfigError(f"{program} did not print a login") from None
    if answer.username == _IDENTITY:
        raise ConfigError(f"{program} holds an identity token (log in with an access token)")
    return Credentials(answer.username, answer.secret)


def _login(entry: _Auth, path: str, server: str) -> Credentials:
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


def _plain(server: str) -> str:
    """Return the host that a server's name stands for, or the name if it has a path of its own."""
    match = _SERVER.fullmatch(server.lower())
    host = match[1] if match else server
    return "docker.io" if host in _HUB_HOSTS else host
