"""The connection with the Valkey or Redis server: what is asked, how long, and what its failures mean.

The only module that imports redis, an optional dependency.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

from redis.asyncio import ConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError as RedisConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError as RedisTimeoutError,
)

from proxy.config import FleetSettings
from proxy.config.values import expand_path
from proxy.errors import ConfigError
from proxy.metrics import FleetOperation, Metrics

# Questions to the server at a time; others wait. Beside them, a heartbeat never waits.
MAX_QUESTIONS = 16
# The parts of `fleet.answer_timeout` that are counted, each as one however long the event loop takes over it.
TICKS = 10
# Seconds for closing the connections.
CLOSE_TIMEOUT = 1.0

SERVER_ERRORS = (RedisError, OSError, TimeoutError, ConfigError)


class DirectoryBlindError(Exception):
    """The directory cannot be asked."""


class FleetServer:
    """The server, and whether it can be asked now.

    After a failure it is blind: nothing is asked until `check` succeeds. `on_blind` is called with the reason.
    """

    def __init__(
        self,
        settings: FleetSettings,
        metrics: Metrics,
        on_blind: Callable[[str], None],
        ca: str = "",
    ) -> None:
        self.is_blind = True
        self._metrics = metrics
        self._on_blind = on_blind
        self._answer_timeout = settings.answer_timeout
        self._turns = asyncio.Semaphore(MAX_QUESTIONS)
        self._client = _open_client(settings, ca)
        self._scripts: dict[str, Any] = {}

    async def close(self) -> None:
        """Close all connections. A server that does not answer delays it by a second at most."""
        with suppress(*SERVER_ERRORS):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._client.aclose()
                await self._client.connection_pool.disconnect()

    async def run(self, script: str, keys: tuple[str, ...], *args: str | float) -> Any:
        """Run a script. Raises one of `SERVER_ERRORS`; to be called within `asking`."""
        return await self._script(script)(keys=keys, args=args)

    async def run_many(
        self, calls: list[tuple[str, tuple[str, ...], tuple[str | float, ...]]]
    ) -> None:
        """Run many scripts in one round trip. Raises one of `SERVER_ERRORS`; to be called within `asking`."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for script, keys, args in calls:
                await self._script(script)(keys=keys, args=args, client=pipeline)
            await pipeline.execute()

    async def command(self, *words: str | float) -> Any:
        """Run a command. Raises one of `SERVER_ERRORS`; to be called within `asking`."""
        return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def asking(
        self, operation: FleetOperation, *, is_check: bool = False
    ) -> AsyncIterator[None]:
        """Time, count and limit a question to the server. It may wait for others of this node first.

        Raises `DirectoryBlindError` if the server fails or is blind; with `is_check` it is asked in any case, and
        no longer blind after an answer.
        """
        started = time.perf_counter()
        async with nullcontext() if is_check else self._turns:
            if self.is_blind and not is_check:
                self._metrics.count_fleet_request(operation, "blind")
                raise DirectoryBlindError
            try:
                async with _uncancelled(), _answer_within(self._answer_timeout):
                    yield
            except SERVER_ERRORS as error:
                self._metrics.count_fleet_request(operation, "failed")
                self.is_blind = True
                self._on_blind(explain(error, self._answer_timeout))
                raise DirectoryBlindError from error
        self._metrics.count_fleet_request(operation, "ok", time.perf_counter() - started)
        if is_check:
            self.is_blind = False

    def _script(self, text: str) -> Any:
        if text not in self._scripts:
            self._scripts[text] = self._client.register_script(text)
        return self._scripts[text]


@asynccontextmanager
async def _answer_within(seconds: float) -> AsyncIterator[None]:
    """Raise `TimeoutError` if the block takes longer.

    While the event loop is busy, an answer that has arrived cannot be read. So it takes several timers that expire
    one after another, with the loop reading between them.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def wait(ticks: int) -> None:
        nonlocal timer
        if ticks:
            timer = loop.call_later(seconds / TICKS, wait, ticks - 1)
        else:
            limit.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as limit:
            wait(TICKS)
            yield
    finally:
        if timer:
            timer.cancel()


@asynccontextmanager
async def _uncancelled() -> AsyncIterator[None]:
    """Raise `CancelledError` after the block if the task was cancelled in it, also if the block has not.

    With a timeout of its own, as for Sentinels, redis-py sends by `asyncio.wait_for`, which in Python 3.11 may ignore
    a cancellation (https://github.com/python/cpython/issues/86296).
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


def explain(error: BaseException, answer_timeout: float) -> str:
    """Return what is wrong with the server, and what to do."""
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return f"the server did not answer within {answer_timeout:g} s (fleet.answer_timeout)"
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    text = str(error)[:120]
    for part, reason in _TEXTS:
        if part in text:
            return reason
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, RedisConnectionError | OSError):
        hint = " (does it speak TLS? then it is valkeys://)" if "reset by peer" in text else ""
        return f"the server cannot be reached: {text}{hint}"
    return f"the server answers with an error: {text}"


_WRONG_PASSWORD = "the server refuses the login; check fleet.valkey_password_file and the user"  # noqa: S105
_READ_ONLY = (
    "the server is a read-only replica; name the primary, or the Sentinels, in fleet.valkey"
)
_OUT_OF_MEMORY = "the server is out of memory; raise its maxmemory"
_TOO_OLD = "the server is too old; Redis 6 or Valkey is needed"
_REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    (AuthenticationError, _WRONG_PASSWORD),
    (NoPermissionError, "the user may not run scripts on the server; check its ACL"),
    (BusyLoadingError, "the server is still loading its data"),
    (ReadOnlyError, _READ_ONLY),
    (OutOfMemoryError, _OUT_OF_MEMORY),
    (
        MasterNotFoundError,
        "the Sentinels know no server of this name; check ?master= in fleet.valkey",
    ),
)
# Errors within a script, and of old servers, have no class.
_TEXTS = (
    ("NOAUTH", _WRONG_PASSWORD),
    ("unauthenticated", _WRONG_PASSWORD),
    ("invalid username-password", _WRONG_PASSWORD),
    ("WRONGPASS", _WRONG_PASSWORD),
    ("READONLY", _READ_ONLY),
    ("read only replica", _READ_ONLY),
    ("OOM ", _OUT_OF_MEMORY),
    ("NOREPLICAS", "the server has too few replicas to accept writes; check min-replicas-to-write"),
    ("MISCONF", "the server refuses writes because it cannot save to its disk"),
    ("non deterministic", _TOO_OLD),
    ("unknown command", _TOO_OLD),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate cannot be verified; name its CA in fleet.valkey_ca_file",
    ),
    ("MOVED", "the server is part of a cluster; name one that is not, or the Sentinels"),
)


class _PasswordFile(CredentialProvider):
    """Reads the password at each connection."""

    def __init__(self, settings: FleetSettings) -> None:
        self._settings = settings

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the password, with the user if there is one. Raises `ConfigError`."""
        password = await asyncio.to_thread(read_password, self._settings)
        user = self._settings.valkey.username
        return (user, password) if user else (password,)


def read_password(settings: FleetSettings) -> str:
    """Return the password of the server. Blocking. Raises `ConfigError`."""
    file = settings.valkey_password_file
    try:
        return expand_path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"fleet.valkey_password_file: {file}: {reason}") from error


def read_ca(settings: FleetSettings) -> str:
    """Return the CA certificates of the server; empty for those of the system. Blocking. Raises `ConfigError`."""
    file = settings.valkey_ca_file
    try:
        return expand_path(file).read_text("ascii") if file else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not PEM"
        raise ConfigError(f"fleet.valkey_ca_file: {file}: {reason}") from error


def _open_client(settings: FleetSettings, ca: str) -> Redis:
    url = settings.valkey
    common: dict[str, Any] = {
        # `asking` limits each question.
        "socket_timeout": None,
        "socket_connect_timeout": None,
        # After a restart of the server every idle connection fails once.
        "retry": Retry(NoBackoff(), 1, (RedisConnectionError,)),
        "decode_responses": True,
        # What no node wrote is no reason to fail.
        "encoding_errors": "replace",
        "protocol": 2,
        # To find its own version, redis-py reads a file at each connection.
        "driver_info": None,
    }
    if settings.valkey_password_file:
        common["credential_provider"] = _PasswordFile(settings)
    if url.is_tls and ca:
        common["ssl_ca_data"] = ca
    if len(url.hosts) > 1:
        options = common | ({"ssl": True} if url.is_tls else {})
        # Each in its turn, before the time for the question is over.
        part = settings.answer_timeout / (len(url.hosts) + 1)
        timeouts = {"socket_timeout": part, "socket_connect_timeout": part}
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
            url.hosts, sentinel_kwargs=options | timeouts, **options
        )
        client: Redis = sentinel.master_for(url.master, db=url.database)
        return client
    kind: type[Any] = SSLConnection if url.is_tls else Connection
    if url.unix_path:
        kind = UnixDomainSocketConnection
        common["path"] = url.unix_path
    else:
        common["host"], common["port"] = url.hosts[0]
    pool = ConnectionPool(connection_class=kind, db=url.database, **common)
    return Redis.from_pool(pool)
