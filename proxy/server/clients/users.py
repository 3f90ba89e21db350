"""Users of the cache: Basic authentication against an htpasswd file of bcrypt hashes.

bcrypt is slow on purpose. Hashes are computed in a separate thread with a queue (`login_queue.py`), and
verified logins are remembered by a keyed hash that is useless outside this process.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import bcrypt

from proxy.concurrency import SingleFlight, run_in_thread
from proxy.config.values import expand_path
from proxy.errors import ConfigError, UnauthorizedError
from proxy.log import get_logger
from proxy.server.clients.connection_limit import client_key
from proxy.server.clients.login_queue import LoginQueue

K = TypeVar("K", bound=Hashable)

# Verified logins that are remembered.
MAX_VERIFIED = 4096
# Seconds between two checks whether the file has changed.
FILE_CHECK_INTERVAL = 2.0
# Users that are remembered with the client address from which they have logged in.
MAX_KNOWN = 4096

# Cost 4 to 14: at 15 a hash takes more than a second.
_BCRYPT_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-4])\$[./A-Za-z0-9]{53}")
_LOGIN_REQUIRED = "log in with a username and password of this cache"
_MAX_PASSWORD_SIZE = 72  # bytes; bcrypt ignores the rest

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Htpasswd:
    """The content of an htpasswd file: bcrypt hashes by user.

    `dummy_hash` matches no password; it is checked for unknown users. `version` changes with the
    file.
    """

    path: Path
    hash_by_user: Mapping[str, bytes]
    dummy_hash: bytes
    version: tuple[int, int, int]


def load_htpasswd(file: str) -> Htpasswd:
    """Read an htpasswd file. Blocks; raises `ConfigError`, which names the line."""
    path = expand_path(file)
    try:
        version = _file_version(path)
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: server.htpasswd: {reason}") from error
    hash_by_user = parse_htpasswd(text, str(path))
    # Cost matches the most expensive hash, so that timing does not reveal which users exist.
    cost = max(int(password_hash[4:6]) for password_hash in hash_by_user.values())
    random_password = secrets.token_bytes(32).hex().encode()
    dummy_hash = bcrypt.hashpw(random_password, bcrypt.gensalt(cost))
    return Htpasswd(path, hash_by_user, dummy_hash, version)


def parse_htpasswd(text: str, source: str) -> dict[str, bytes]:
    """Return the bcrypt hashes by user.

    Raises `ConfigError`, which names the line and the command that makes a valid one.
    """
    hash_by_user: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, password_hash = line.strip().partition(":")
        where = f"{source}: server.htpasswd: line {number}"
        if not (user and colon):
            raise ConfigError(f"{where} is not user:hash (make it with htpasswd -B)")
        if user in hash_by_user:
            raise ConfigError(f"{where}: {user[:40]} is listed twice")
        if _BCRYPT_HASH.fullmatch(password_hash) is None:
            raise ConfigError(
                f"{where}: the hash of {user[:40]} is not bcrypt of cost 4 to 14 "
                f"(make it with: htpasswd -B {source} {user[:40]})"
            )
        hash_by_user[user] = password_hash.encode()
    if not hash_by_user:
        raise ConfigError(
            f"{source}: server.htpasswd: contains no users (add one: htpasswd -B -c {source} NAME)"
        )
    return hash_by_user


class HtpasswdAuth:
    """Checks the credentials of requests, and rereads the file when it changes."""

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
        self._queue = LoginQueue()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    @property
    def is_enabled(self) -> bool:
        """Whether clients must log in."""
        return self._htpasswd is not None

    def set_htpasswd(self, htpasswd: Htpasswd | None) -> None:
        """Use these users from now on, or require no login if None."""
        self._htpasswd = htpasswd

    async def check(self, authorization: str, client: str) -> str:
        """Return the user, or raise `UnauthorizedError` unless the header has a valid login.

        The error and the time it takes are the same whatever is wrong, so that they do not reveal
        which users exist. Raises `TooManyRequestsError` if too many passwords wait for their hash.
        """
        now = asyncio.get_running_loop().time()
        if now - self._file_checked_at > FILE_CHECK_INTERVAL:
            self._file_checked_at = now
            self._reloads.start(None, self._reload_if_changed)
        user, password = _parse_basic(authorization)
        htpasswd = self._htpasswd
        if htpasswd is None:
            return ""
        password_hash = htpasswd.hash_by_user.get(user, htpasswd.dummy_hash)
        # It includes the hash, so that a remembered login ends when the file changes it.
        login = b"\0".join((password_hash, user.encode(), password))
        login_digest = hmac.digest(self._hmac_key, login, hashlib.sha256)
        if login_digest in self._verified:
            self._verified.move_to_end(login_digest)
            return user
        is_known_user = user in htpasswd.hash_by_user
        origin = (user, client_key(client))

        async def verify() -> bool:
            async with self._queue.turn(origin[1], is_known=origin in self._known):
                is_correct = await run_in_thread(
                    self._threads, _is_password_correct, password, password_hash
                )
            if is_correct and is_known_user:
                # Remembered before the check ends, so that no request in between starts another.
                _remember(self._verified, login_digest, MAX_VERIFIED)
                _remember(self._known, origin, MAX_KNOWN)
            return is_correct and is_known_user

        if not await self._checks.run(login_digest, verify):
            raise UnauthorizedError(_LOGIN_REQUIRED)
        return user

    async def _reload_if_changed(self) -> None:
        """Reread the file if it has changed; if it is invalid, keep the current users."""
        current = self._htpasswd
        if current is None:
            return
        path = current.path
        try:
            if await run_in_thread(self._threads, _file_version, path) == current.version:
                return
            changed = await run_in_thread(self._threads, load_htpasswd, str(path))
            if self._htpasswd is current:
                self.set_htpasswd(changed)
            log.info("htpasswd_reloaded", file=str(path))
        except (OSError, ConfigError) as error:
            log.warning("htpasswd_reload_failed", reason=str(error))


def _remember(memory: OrderedDict[K, None], key: K, limit: int) -> None:
    memory[key] = None
    memory.move_to_end(key)
    if len(memory) > limit:
        memory.popitem(last=False)


def _file_version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _parse_basic(authorization: str) -> tuple[str, bytes]:
    """Return username and password of the header (RFC 7617). Raises `UnauthorizedError`."""
    scheme, _, encoded = authorization.partition(" ")
    try:
        user, colon, password = b64decode(encoded.strip(), validate=True).partition(b":")
        if scheme.lower() != "basic" or not colon or b"\0" in user:
            raise UnauthorizedError(_LOGIN_REQUIRED)
        return user.decode(), password
    except (Base64Error, ValueError) as error:
        raise UnauthorizedError(_LOGIN_REQUIRED) from error


def _is_password_correct(password: bytes, password_hash: bytes) -> bool:
    is_equal = bcrypt.checkpw(password[:_MAX_PASSWORD_SIZE], password_hash)
    return is_equal and len(password) <= _MAX_PASSWORD_SIZE
