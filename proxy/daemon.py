"""The daemon as a process: signals, the service manager, and the log, around the program.

SIGTERM and SIGINT end it, a second one sooner; SIGHUP has it read its configuration again; SIGQUIT has it log
what its tasks wait for.
"""

import asyncio
import faulthandler
import os
import signal
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
from proxy.server.connection_limit import raise_file_limit
from proxy.systemd import Notifier, ServiceManager, read_service_manager

# How often the manager is told how it goes, if it has no watchdog, in seconds.
STATUS_INTERVAL = 10.0
# A start or a stop that takes longer than the manager allows says so often that it goes on, for so long.
EXTENSION_INTERVAL = 5.0
EXTENSION_SECONDS = 60.0

# Threads for what the loop has done elsewhere; and all there ever are, with those of log, disk, index, logins and libuv.
LOOP_THREADS = 8
THREAD_LIMIT = LOOP_THREADS + DISK_THREADS + 7

_STDERR = 2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = get_logger(__name__)


def run(load: Callable[[], Config], on_ready: Callable[[DaemonInfo], None]) -> None:
    """Serve until SIGTERM or SIGINT. `load` gives the configuration, at the start and at each SIGHUP.

    `announce` is called once, when clients can connect. Raises `StorageError` and `ConfigError`.
    """
    # What systemd's watchdog ends (SIGABRT) leaves the stacks of its threads.
    faulthandler.enable(_STDERR)
    config, manager = load(), read_service_manager(os.environ)
    raise_file_limit()
    # What is started one by one below has room, or it is said here.
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
        # libuv starts its threads with the first name that is looked up, and aborts the process if it cannot.
        await loop.getaddrinfo("localhost", 0)
    stop, reload = asyncio.Event(), asyncio.Event()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    loop.add_signal_handler(signal.SIGQUIT, _log_tasks)
    notifier = manager.notifier
    async with AsyncExitStack() as stack:
        # Which leaves room for the thread that ends a loop's threads.
        stack.callback(threads.shutdown)
        async with background(_extend_start_timeout(notifier)):
            # It asks before the store is opened, which may block.
            await asyncio.sleep(0)
            opening = open_cache(config, access_log=access_log, sockets=manager.sockets)
            running = await stack.enter_async_context(opening)
        on_ready(running.info)
        log.info("daemon_started", addresses=running.info.addresses, version=__version__)
        notifier.ready(running.status_line)
        async with asyncio.TaskGroup() as group:
            work = (
                _report_status(running, manager),
                _reload_on_signal(running, load, reload, notifier),
            )
            tasks = [group.create_task(one) for one in work]
            await stop.wait()
            for task in tasks:
                task.cancel()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, running.skip_drain)
        log.info("daemon_stopping")
        notifier.stopping()


async def _extend_start_timeout(notifier: Notifier) -> None:
    """Keep the manager from ending us, for ever."""
    while True:
        notifier.extend_timeout("opening the store", EXTENSION_SECONDS)
        await asyncio.sleep(EXTENSION_INTERVAL)


async def _report_status(app: RunningApp, manager: ServiceManager) -> None:
    """Tell the manager how it goes, for ever; with a watchdog, only if the store answers."""
    while True:
        await asyncio.sleep(manager.watchdog / 2 or STATUS_INTERVAL)
        if not manager.watchdog:
            manager.notifier.status(app.status_line)
            continue
        # An error is an answer: on a full or broken disk we still serve, and a restart mends nothing.
        with suppress(StorageError):
            await app.check_store()
        manager.notifier.ping_watchdog(app.status_line)


async def _reload_on_signal(
    app: RunningApp, load: Callable[[], Config], requested: asyncio.Event, notifier: Notifier
) -> None:
    """Reload whenever it is asked for; several requests meanwhile are one."""
    while True:
        await requested.wait()
        requested.clear()
        notifier.reloading()
        await app.reload(load)
        notifier.ready(app.status_line)


def _log_tasks() -> None:
    """Log where every task waits."""
    for task in asyncio.all_tasks():
        frames = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]
        log.warning("task_dumped", task=task.get_name(), waits=" > ".join(frames))
