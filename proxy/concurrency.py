"""Helpers for asyncio: single flight, deadlines, threads, and work that must be completed."""

import asyncio
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterator,
)
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from proxy.errors import ConfigError, UpstreamTimeoutError, UpstreamUnavailableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
P = ParamSpec("P")
R = TypeVar("R")

# Seconds within which the head of every response is sent, an error if upstream is silent. Clients
# give up on a mirror that is silent for 30 s (containerd 2.3, Docker 29).
RESPONSE_TIMEOUT = 14.0
# Seconds between two readings of a clock that may be changed at any time.
CLOCK_POLL_INTERVAL = 0.5


@asynccontextmanager
async def enforce_deadline(when: float, upstream: str) -> AsyncIterator[None]:
    """Cancel the block at the time `when` of the loop's clock, and raise `UpstreamTimeoutError`.

    Work owned by other tasks, such as single flights and downloads, continues.
    """
    try:
        async with asyncio.timeout_at(when):
            yield
    except TimeoutError:
        raise UpstreamTimeoutError(
            f"{upstream} did not respond within {RESPONSE_TIMEOUT:.0f} s; try again in a moment"
        ) from None


async def sleep_until(when: float, clock: Callable[[], float]) -> None:
    """Wait until the Unix time `when`, even if the clock is changed or the machine is suspended."""
    while (left := when - clock()) > 0:  # noqa: ASYNC110 (a clock does not signal that it was set)
        await asyncio.sleep(min(left, CLOCK_POLL_INTERVAL))


class SingleFlight(Generic[K, V]):
    """Runs work at most once for each key at a time, and gives all waiters its result or error.

    The work is a task of the group, so that cancelling a waiter does not cancel it.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._running: dict[K, asyncio.Task[V | Exception]] = {}

    async def run(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """Run `work`, unless work for `key` is already running, and return its result.

        Raises the error of the work, and `UpstreamUnavailableError` if the daemon stops first.
        """
        task = self._get_or_create_task(key, work)
        await asyncio.wait((task,))
        if task.cancelled():
            raise _shutdown_error()
        result = task.result()
        if isinstance(result, Exception):
            # A copy for each waiter, because raising changes an exception's traceback and context.
            raise copy(result) from result
        return result

    async def wait(self, key: K) -> None:
        """Wait for the end of the work that runs for `key`, if any."""
        if task := self._running.get(key):
            await asyncio.wait((task,))

    def start(self, key: K, work: Callable[[], Awaitable[V]]) -> None:
        """Start `work` in the background, unless work for `key` is already running.

        Raises `UpstreamUnavailableError` if the daemon is stopping.
        """
        _ = self._get_or_create_task(key, work)

    def _get_or_create_task(
        self, key: K, work: Callable[[], Awaitable[V]]
    ) -> asyncio.Task[V | Exception]:
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = start_task(self._group, _capture_error(work))
            task.add_done_callback(lambda _: self._running.pop(key))
        return task

    def __contains__(self, key: K) -> bool:
        return key in self._running

    def __len__(self) -> int:
        return len(self._running)


def start_task(group: asyncio.TaskGroup, work: Coroutine[Any, Any, V]) -> asyncio.Task[V]:
    """Run `work` in a task of the group. Raises `UpstreamUnavailableError` if the daemon is stopping."""
    try:
        return group.create_task(work)
    except RuntimeError as error:
        work.close()
        raise _shutdown_error() from error


def _shutdown_error() -> UpstreamUnavailableError:
    return UpstreamUnavailableError("the cache is shutting down; try again in a moment")


async def _capture_error(work: Callable[[], Awaitable[V]]) -> V | Exception:
    # An exception that leaves the task would end its group, and with it the daemon.
    try:
        return await work()
    except Exception as error:  # noqa: BLE001 (`run` raises it)
        return error


async def run_uncancelled(
    work: Awaitable[R], *, on_cancel: Callable[[], object] = lambda: None
) -> R:
    """Return the result of `work`; if the caller is cancelled, let the work finish first.

    For work that must not stop halfway, such as a commit or a thread that writes a file. `on_cancel`
    may ask it to finish early.
    """
    future = asyncio.ensure_future(work)  # noqa: TID251 (this frame owns and outlives it)
    try:
        await asyncio.wait((future,))
    except asyncio.CancelledError:
        on_cancel()
        await asyncio.wait((future,))
        raise
    return future.result()


@asynccontextmanager
async def background(work: Awaitable[R]) -> AsyncIterator["asyncio.Future[R]"]:
    """Run `work` concurrently with the block; at the end of the block, cancel and await it."""
    future = asyncio.ensure_future(work)  # noqa: TID251 (this frame owns and outlives it)
    try:
        yield future
    finally:
        future.cancel()
        await run_uncancelled(asyncio.wait((future,)))
        if not future.cancelled():
            future.exception()  # marks it as retrieved; the block had the chance to await it


async def run_all(*works: Awaitable[None]) -> None:
    """Run all `works` to completion; the first error cancels the others and is raised."""
    async with AsyncExitStack() as stack:
        pending = {await stack.enter_async_context(background(work)) for work in works}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()


async def read_ahead(items: Iterator[R], executor: Executor) -> AsyncGenerator[R, None]:
    """Yield the items, each produced in a thread while the consumer handles the one before."""
    loop = asyncio.get_running_loop()
    upcoming = loop.run_in_executor(executor, next, items, None)
    try:
        while True:
            # Not `await upcoming`: cancellation would cancel the future but not its thread.
            await asyncio.wait((upcoming,))
            item = upcoming.result()
            if item is None:
                return
            upcoming = loop.run_in_executor(executor, next, items, None)
            yield item
    finally:
        await run_uncancelled(asyncio.wait((upcoming,)))
        upcoming.exception()  # marks it as retrieved; the consumer has stopped


def start_threads(count: int, thread_name_prefix: str) -> ThreadPoolExecutor:
    """Return a pool whose threads have all been started.

    A limit on threads then fails the start of the daemon, and not a request later. Raises
    `ConfigError` if the system does not allow that many threads.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=thread_name_prefix)
    all_started = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(all_started.wait)
        all_started.wait()
    except RuntimeError as error:
        all_started.abort()
        pool.shutdown(wait=False)
        raise ConfigError(
            f"cannot start {count} threads for {thread_name_prefix} (raise TasksMax= of the unit, "
            "pids.max of the container, or ulimit -u)"
        ) from error
    return pool


async def run_in_thread(
    executor: Executor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Return `work(...)`, run in a thread of the executor.

    Threads cannot be cancelled, so a cancelled caller waits for the thread; otherwise it would
    close files to which the thread still writes.
    """
    loop = asyncio.get_running_loop()
    return await run_uncancelled(loop.run_in_executor(executor, partial(work, *args, **kwargs)))
