"""The daemon that a command runs within its own process while no other daemon runs on the store."""

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
    """Run the daemon in a thread for the duration of the block; shut it down in order afterwards.

    It listens on its admin socket only, runs no scheduled preloads, and logs warnings and errors.
    Raises `StorageError`, `ConfigError`, and `DaemonUnavailableError` if another process uses the
    store.
    """
    no_listeners = {
        "listen": (),
        "admin_listen": (),
        "tls_certificate": (),
        "tls_key": (),
        "htpasswd": "",
    }
    daemon_config = replace(config, server=replace(config.server, **no_listeners), preload=())
    level = "error" if config.log.level == "error" else "warning"
    with closing(configure_logging(level, config.log.format)), _exit_on_sigterm():
        started: Future[_StopHandle] = Future()
        thread = threading.Thread(
            target=_run, args=(daemon_config, started), name="daemon", daemon=True
        )
        thread.start()
        try:
            started.result()
            yield
        except StoreInUseError as error:
            problem = str(error).partition(";")[0]
            raise DaemonUnavailableError(
                f"{problem}, which does not respond (it is starting, stopping or running fsck); "
                "try again in a moment"
            ) from error
        finally:
            started.add_done_callback(_request_stop)
            thread.join()


def _request_stop(started: "Future[_StopHandle]") -> None:
    if not started.exception():
        loop, stop = started.result()
        with suppress(RuntimeError):  # the loop has closed already
            loop.call_soon_threadsafe(stop.set)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the block, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def exit_process(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, exit_process)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(config: Config, started: "Future[_StopHandle]") -> None:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, started))
    except BaseException as error:
        if started.done():
            raise  # a bug, whose traceback threading prints
        started.set_exception(error)


async def _serve(config: Config, started: "Future[_StopHandle]") -> None:
    stop = asyncio.Event()
    async with open_cache(config):
        started.set_result((asyncio.get_running_loop(), stop))
        await stop.wait()
