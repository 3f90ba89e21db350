"""The daemon that a command is for itself, when no other runs on the store."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import NoReturn

import uvloop
from msgspec.structs import replace

from proxy.app import open_cache
from proxy.config import Config
from proxy.errors import DaemonUnavailableError, StoreInUseError
from proxy.log import configure_logging

_StopHandle = tuple[asyncio.AbstractEventLoop, asyncio.Event]


@contextmanager
def embedded_daemon(config: Config) -> Iterator[None]:
    """Run the program on the store, in a thread, with nothing but its socket; end it in order.

    It preloads nothing by itself. Only warnings are logged. Raises `StorageError` and `ConfigError`.
    """
    alone = {"listen": (), "admin_listen": (), "tls_certificate": (), "tls_key": (), "htpasswd": ""}
    server = replace(config.server, **alone)
    level = "error" if config.log.level == "error" else "warning"
    with closing(configure_logging(level, config.log.format)), _exit_on_sigterm():
        started: Future[_StopHandle] = Future()
        thread = threading.Thread(
            target=_run,
            args=(replace(config, server=server, preload=()), started),
            name="daemon",
            daemon=True,
        )
        thread.start()
        try:
            started.result()
            yield
        except StoreInUseError as error:
            raise DaemonUnavailableError(
                f"{str(error).partition(';')[0]}, which does not answer (it starts, stops, or checks "
                "the store); try again in a moment"
            ) from error
        finally:
            started.add_done_callback(_request_stop)
            thread.join()


def _request_stop(started: "Future[_StopHandle]") -> None:
    if not started.exception():
        loop, stop = started.result()
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(stop.set)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: Config, started: "Future[_StopHandle]") -> None:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, started))
    except BaseException as error:
        if started.done():
            raise  # threading prints it: a bug
        started.set_exception(error)


async def _serve(config: Config, started: "Future[_StopHandle]") -> None:
    stop = asyncio.Event()
    async with open_cache(config):
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
