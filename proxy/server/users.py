"""Who may use the cache: the users of an htpasswd file, their passwords as bcrypt hashes.

A hash costs what it costs on purpose, so it is computed in a thread of its own, by few at a time, and whoever was right
is remembered: by a keyed hash that means nothing outside of this process.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import bcrypt

from proxy.concurrency import SingleFlight, run_in_thread
from proxy.config.values import expand_path
from proxy.errors import ConfigError, TooManyRequestsError, UnauthorizedError
from proxy.log import get_logger

# How many right passwords are remembered, and how long before the file is looked at again, in seconds.
MAX_VERIFIED = 4096
FILE_CHECK_INTERVAL = 2.0
# Passwords that may be waiting to be hashed, in all and of one client.
MAX_WAITING = 64
MAX_WAITING_PER_CLIENT = 4

# Cost 15 takes more than a second here.
_BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{53}")
_LOGIN_REQUIRED = "log in with a user and password of this cache"
_MAX_PASSWORD_SIZE = 72  # bytes; bcrypt ignores what follows

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Htpasswd:
    """The content of a file: bcrypt hashes by user, and one that no password has, for users who are not there."""

    path: Path
    hash_by_user: Mapping[str, bytes]
    dummy_hash: bytes
    version: tuple[int, int, int]


def load_htpasswd(file: str) -> Htpasswd:
    """Return what an htpasswd file holds. Blocks; raises `ConfigError` that names the line."""
    path = expand_path(file)
    try:
        version = _file_version(path)
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: server.htpasswd: {reason}") from error
    by_user = parse_htpasswd(text, str(path))
    # As dear as the dearest, so that the time does not tell who is there.
    cost = max(int(hashed[4:6]) for hashed in by_user.values())
    nobody = bcrypt.hashpw(secrets.token_bytes(32).hex().encode(), bcrypt.gensalt(cost))
    return Htpasswd(path, by_user, nobody, version)


def parse_htpasswd(text: str, source: str) -> dict[str, bytes]:
    """Return the bcrypt hashes by user, or raise `ConfigError`, which names the line and what would make it."""
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, hashed = line.strip().partition(":")
        place = f"{source}: server.htpasswd: line {number}"
        if not (user and colon):
            raise ConfigError(f"{place} is not user:hash (make it with htpasswd -B)")
        if user in found:
            raise ConfigError(f"{place}: {user[:40]} is there twice")
        if _BCRYPT_HASH.fullmatch(hashed) is None:
            raise ConfigError(
                f"{place}: the hash of {user[:40]} is not bcrypt of cost 4 to 14 "
                f"(make it with: htpasswd -B {source} {user[:40]})"
            )
        found[user] = hashed.encode()
    if not found:
        raise ConfigError(
            f"{source}: server.htpasswd: holds no user (htpasswd -B -c {source} NAME)"
        )
    return found


class HtpasswdAuth:
    """Judges the logins of requests."""

    def __init__(
        self, htpasswd: Htpasswd | None, threads: Executor, group: asyncio.TaskGroup
    ) -> None:
        self._htpasswd = htpasswd
        self._threads = threads
        self._hmac_key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._checks = SingleFlight[bytes, bool](group)
        self._reloads = SingleFlight[None, None](group)
        self._file_checked_at = asyncio.get_running_loop().time()
        self._waiting: Counter[str] = Counter()

    @property
    def is_enabled(self) -> bool:
        """Whether anybody has to log in."""
        return self._htpasswd is not None

    def set_htpasswd(self, htpasswd: Htpasswd | None) -> None:
        """Judge by these from now on."""
        self._htpasswd = htpasswd

    async def check(self, authorization: str, client: str) -> None:
        """Raise `UnauthorizedError` unless the header names a user and their password, `CrowdedError` if too many ask.

        Whatever is wrong, the error is the same, and a user who is not there takes as long as one who is.
        """
        now = asyncio.get_running_loop().time()
        if now - self._file_checked_at > FILE_CHECK_INTERVAL:
            self._file_checked_at = now
            self._reloads.start(None, self._reload_if_changed)
        user, password = _parse_basic(authorization)
        passwords = self._htpasswd
        if passwords is None:
            return
        hashed = passwords.hash_by_user.get(user, passwords.dummy_hash)
        # With the hash in it, what is remembered ends when the file changes.
        mark = hmac.digest(
            self._hmac_key, b"\0".join((hashed, user.encode(), password)), hashlib.sha256
        )
        if mark in self._verified:
            self._verified.move_to_end(mark)
            return
        if mark not in self._checks:
            self._admit(client)
        is_right = await self._checks.run(
            mark, lambda: self._verify_password(client, password, hashed)
        )
        if not is_right or user not in passwords.hash_by_user:
            raise UnauthorizedError(_LOGIN_REQUIRED)
        self._verified[mark] = None
        if len(self._verified) > MAX_VERIFIED:
            self._verified.popitem(last=False)

    def _admit(self, client: str) -> None:
        """Count a password that is going to be hashed, or raise `CrowdedError`."""
        is_full = self._waiting.total() >= MAX_WAITING
        if is_full or self._waiting[client] >= MAX_WAITING_PER_CLIENT:
            raise TooManyRequestsError("too many logins are being checked; try again in a moment")
        self._waiting[client] += 1

    async def _verify_password(self, client: str, password: bytes, password_hash: bytes) -> bool:
        try:
            return await run_in_thread(self._threads, _is_password_correct, password, password_hash)
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]

    async def _reload_if_changed(self) -> None:
        """Read the file again if it is another one by now; what is wrong is not taken."""
        used = self._htpasswd
        if used is None:
            return
        path = used.path
        try:
            if await run_in_thread(self._threads, _file_version, path) == used.version:
                return
            found = await run_in_thread(self._threads, load_htpasswd, str(path))
            if self._htpasswd is used:
                self.set_htpasswd(found)
            log.info("htpasswd_reloaded", file=str(path))
        except (OSError, ConfigError) as error:
            log.warning("htpasswd_reload_failed", reason=str(error))


def _file_version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _parse_basic(authorization: str) -> tuple[str, bytes]:
    """Return user and password of a header (RFC 7617), or raise `UnauthorizedError`."""
    scheme, _, given = authorization.partition(" ")
    try:
        user, colon, password = b64decode(given.strip(), validate=True).partition(b":")
        if scheme.lower() != "basic" or not colon or b"\0" in user:
            raise UnauthorizedError(_LOGIN_REQUIRED)
        return user.decode(), password
    except (Base64Error, ValueError) as error:
        raise UnauthorizedError(_LOGIN_REQUIRED) from error


def _is_password_correct(password: bytes, password_hash: bytes) -> bool:
    is_equal = bcrypt.checkpw(password[:_MAX_PASSWORD_SIZE], password_hash)
    return is_equal and len(password) <= _MAX_PASSWORD_SIZE
