"""The daemon process: event loop, signals, service manager and log, around `proxy.app`.

SIGTERM and SIGINT shut it down, a second one without waiting for running responses. SIGHUP reloads
the configuration. SIGQUIT logs where every task is waiting.
"""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import uvloop

from proxy import __version__
from proxy.app import DaemonInfo, RunningApp, open_cache
from proxy.concurrency import background, start_threads
from proxy.config import Config
from proxy.core import DISK_THREADS
from proxy.errors import StorageError
from proxy.log import LogWriter, configure_logging, get_logger
from proxy.server.clients.connection_limit import raise_file_limit
from proxy.storage.index import LIST_THREADS
from proxy.systemd import Notifier, ServiceManager, read_service_manager

# Seconds between two status lines to the service manager, if it has no watchdog.
STATUS_INTERVAL = 10.0
# While the start takes long: seconds between two requests for more time, and seconds requested.
EXTENSION_INTERVAL = 5.0
EXTENSION_SECONDS = 60.0

# Threads of the event loop's default executor, and of the whole process: these and those of the
# disk, the lists, the log, the index, the scrub, the parser, password checks and libuv.
LOOP_THREADS = 8
THREAD_LIMIT = LOOP_THREADS + DISK_THREADS + LIST_THREADS + 9

# Seconds for which a thread that runs Python code may hold up the event loop, instead of Python's 5 ms:
# one request needs the interpreter several times.
SWITCH_INTERVAL = 0.001

_STDERR = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = get_logger(__name__)


def run(load: Callable[[], Config], on_ready: Callable[[DaemonInfo], None]) -> None:
    """Serve until SIGTERM or SIGINT. `load` returns the configuration, at the start and on SIGHUP.

    `on_ready` is called once, when clients can connect. Raises `StorageError` and `ConfigError`.
    """
    # If systemd's watchdog aborts us (SIGABRT), the log shows the stacks of all threads.
    faulthandler.enable(_STDERR)
    config, manager = load(), read_service_manager(os.environ)
    sys.setswitchinterval(SWITCH_INTERVAL)
    raise_file_limit()
    # Fail here, with a clear message, if the process may not have as many threads as it will need.
    start_threads(THREAD_LIMIT, "the daemon").shutdown()
    access_log = configure_logging(config.log.level, config.log.format)
    try:
        uvloop.run(_serve(config, load, on_ready, access_log, manager))
    finally:
        manager.notifier.close()
        access_log.close()


async def _serve(
    config: Config,
    load: Callable[[], Config],
    on_ready: Callable[[DaemonInfo], None],
    access_log: LogWriter,
    manager: ServiceManager,
) -> None:
    loop = asyncio.get_running_loop()
    threads = start_threads(LOOP_THREADS, "loop")
    loop.set_default_executor(threads)
    with suppress(OSError):
        # The first name lookup starts libuv's threads. If it cannot start them later, libuv aborts.
        await loop.getaddrinfo("localhost", 0)
    stop, reload = asyncio.Event(), asyncio.Event()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    loop.add_signal_handler(signal.SIGQUIT, _log_tasks)
    notifier = manager.notifier
    async with AsyncExitStack() as stack:
        # Closing the loop starts a thread that waits for the executor: free the others before.
        stack.callback(threads.shutdown)
        async with background(_extend_start_timeout(notifier)):
            # Let it send its first request: opening the store may block the loop.
            await asyncio.sleep(0)
            opening = open_cache(config, access_log=access_log, sockets=manager.sockets)
            running = await stack.enter_async_context(opening)
        # What the program consists of stays: a garbage collection need not look at it again.
        gc.freeze()
        on_ready(running.info)
        log.info("daemon_started", addresses=running.info.addresses, version=__version__)
        notifier.ready(running.status_line)
        async with asyncio.TaskGroup() as group:
            tasks = (
                group.create_task(_report_status(running, manager)),
                group.create_task(_reload_on_signal(running, load, reload, notifier)),
            )
            await stop.wait()
            for task in tasks:
                task.cancel()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, running.skip_drain)
        log.info("daemon_stopping")
        notifier.stopping()


async def _extend_start_timeout(notifier: Notifier) -> None:
    """Ask for more time until cancelled."""
    while True:
        notifier.extend_timeout("opening the store", EXTENSION_SECONDS)
        await asyncio.sleep(EXTENSION_INTERVAL)


async def _report_status(app: RunningApp, manager: ServiceManager) -> None:
    """Report the status until cancelled; reset the watchdog only while the store responds."""
    while True:
        await asyncio.sleep(manager.watchdog / 2 or STATUS_INTERVAL)
        if not manager.watchdog:
            manager.notifier.status(app.status_line)
            continue
        # An error is a response: with a full or broken disk we still serve, and a restart would not
        # help.
        with suppress(StorageError):
            await app.check_store()
        manager.notifier.ping_watchdog(app.status_line)


async def _reload_on_signal(
    app: RunningApp, load: Callable[[], Config], requested: asyncio.Event, notifier: Notifier
) -> None:
    """Reload whenever `requested` is set; signals during a reload result in one more reload."""
    while True:
        await requested.wait()
        requested.clear()
        notifier.reloading()
        await app.reload(load)
        notifier.ready(app.status_line)


def _log_tasks() -> None:
    """Log the stack of every task."""
    for task in asyncio.all_tasks():
        frames = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]
        log.warning("task_dumped", task=task.get_name(), waits=" > ".join(frames))
