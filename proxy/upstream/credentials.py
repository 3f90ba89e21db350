"""Where an upstream's credentials come from, off the loop and within bounds.

A credential helper is a stranger's program: it gets ten seconds, its output a bound, no shell, and
none of our own environment variables, which may hold other upstreams' passwords.
"""

import asyncio
import os
import select
import signal
import time
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

from proxy.config import UpstreamSettings
from proxy.errors import ConfigError, ProxyError, UpstreamUnavailableError
from proxy.flight import SingleFlight
from proxy.upstream.logins import (
    Credentials,
    helper_program,
    parse_helper_answer,
    read_docker_config,
    server_of,
)

HELPER_TIMEOUT = 10.0
MAX_HELPER_ANSWER = 64 << 10
# How long a helper's answer is used, and how long one that failed is left alone, in seconds.
HELPER_TTL = 300.0
FAILURE_TTL = 10.0


class CredentialSource:
    """Knows one upstream's login. Files are read at each use, a helper's answers kept for minutes."""

    def __init__(self, name: str, settings: UpstreamSettings, group: asyncio.TaskGroup) -> None:
        self._name = name
        self._settings = settings
        self._runs: SingleFlight[str, Credentials] = SingleFlight(group)
        self._kept: dict[str, tuple[Credentials | ProxyError, float]] = {}
        self._now = asyncio.get_running_loop().time

    async def get(self) -> Credentials | None:
        """Return the login, None for anonymous. Raises `UpstreamUnavailableError`."""
        settings = self._settings
        try:
            if settings.docker_config:
                found = await asyncio.to_thread(
                    read_docker_config, settings.docker_config, server_of(settings.url)
                )
                return found if isinstance(found, Credentials) else await self._ask(found)
            if settings.credential_helper:
                return await self._ask(settings.credential_helper)
            if settings.password_file:
                password = await asyncio.to_thread(settings.read_password)
                return Credentials(settings.username, password)
        except ConfigError as error:
            raise UpstreamUnavailableError(f"no login for {self._name}: {error}") from error
        return Credentials(settings.username, settings.password) if settings.username else None

    async def _ask(self, helper: str) -> Credentials:
        kept, expires = self._kept.get(helper, (None, 0.0))
        if kept is None or expires <= self._now():
            return await self._runs.do(helper, lambda: self._run(helper))
        if isinstance(kept, ProxyError):
            raise ConfigError(str(kept))
        return kept

    async def _run(self, helper: str) -> Credentials:
        try:
            server = server_of(self._settings.url)
            found = await asyncio.to_thread(ask_helper, helper, server)
        except ConfigError as error:
            self._kept = {helper: (error, self._now() + FAILURE_TTL)}
            raise
        self._kept = {helper: (found, self._now() + HELPER_TTL)}
        return found


def ask_helper(helper: str, server: str, *, patience: float = HELPER_TIMEOUT) -> Credentials:
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
            deadline = time.monotonic() + patience
            content = _converse(process, program, server, deadline)
            status = process.wait(deadline - time.monotonic())
        except TimeoutExpired as error:
            raise ConfigError(f"{program} did not answer in {patience:g} s") from error
        finally:
            # Its children too, which may hold its output open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        # What it printed may be anything: its own words are for whoever runs it by hand.
        raise ConfigError(f"{program} has no login for {server} (exit code {status})")
    return parse_helper_answer(content, program)


def _converse(process: Popen[bytes], program: str, server: str, deadline: float) -> bytes:
    """Ask, and return what is printed. Raises `TimeoutExpired`, and `ConfigError` if it is long."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(server.encode() + b"\n")
    content = bytearray()
    output = select.poll()  # select.select takes no descriptor above 1023, and there are many
    output.register(process.stdout, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0 and output.poll(left * 1000):
        chunk = process.stdout.read(MAX_HELPER_ANSWER)
        if not chunk:
            return bytes(content)
        content += chunk
        if len(content) > MAX_HELPER_ANSWER:
            raise ConfigError(f"{program} printed more than {MAX_HELPER_ANSWER} bytes")
    raise TimeoutExpired(program, deadline)
