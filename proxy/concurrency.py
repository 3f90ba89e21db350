"""Single flight: work that many ask for at once is done once.

The work belongs to a task group, not to the one who asked first: whoever waits may be cancelled
without cancelling it, and its result, or its error, is everybody's.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Hashable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from copy import copy
from functools import partial
from typing import Generic, ParamSpec, TypeVar

from proxy.errors import ConfigError, UpstreamTimeoutError, UpstreamUnavailableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
P = ParamSpec("P")
R = TypeVar("R")


# Seconds from a request to the headers of its answer, or its error, whatever upstream does. Clients
# give up on a mirror that is silent for 30 s (containerd 2.3, Docker 29).
RESPONSE_TIMEOUT = 14.0
# A tag's refresh ends so much earlier, for the sake of its stale copy.
STALE_MARGIN = 1.0
# A clock is looked at so often, in seconds.
CLOCK_POLL_INTERVAL = 0.5


@asynccontextmanager
async def enforce_deadline(when: float, upstream: str) -> AsyncIterator[None]:
    """Let the block wait until this time of the loop, or raise `UpstreamTimeoutError`.

    What it waits for goes on if it has an owner of its own, as single flights and downloads have.
    """
    try:
        async with asyncio.timeout_at(when):
            yield
    except TimeoutError:
        raise UpstreamTimeoutError(
            f"{upstream} has not answered for {RESPONSE_TIMEOUT:.0f} s; try again in a moment"
        ) from None


async def sleep_until(when: float, clock: Callable[[], float]) -> None:
    """Wait until `clock`, Unix time, says `moment`: through a sleep of the machine, and however it is set."""
    while (left := when - clock()) > 0:  # noqa: ASYNC110 (clocks tell nobody when they are set)
        await asyncio.sleep(min(left, CLOCK_POLL_INTERVAL))


class SingleFlight(Generic[K, V]):
    """Runs at most one piece of work for each key at a time."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._running: dict[K, asyncio.Task[V | Exception]] = {}

    async def run(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """Return what `work` returns, or what the work that already runs for `key` returns.

        Raises what it raises, and `UpstreamUnavailableError` if the daemon stops meanwhile.
        """
        task = self._get_or_create_task(key, work)
        await asyncio.wait((task,))
        if task.cancelled():
            raise UpstreamUnavailableError("the cache is shutting down; try again in a moment")
        result = task.result()
        if isinstance(result, Exception):
            # Each waiter raises its own: tracebacks and contexts are not for sharing.
            raise copy(result) from result
        return result

    def start(self, key: K, work: Callable[[], Awaitable[V]]) -> None:
        """Start the work unless it runs; nobody waits for it."""
        _ = self._get_or_create_task(key, work)

    def _get_or_create_task(
        self, key: K, work: Callable[[], Awaitable[V]]
    ) -> asyncio.Task[V | Exception]:
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = self._group.create_task(_capture_error(work))
            task.add_done_callback(lambda _: self._running.pop(key))
        return task

    def __contains__(self, key: K) -> bool:
        return key in self._running


async def _capture_error(work: Callable[[], Awaitable[V]]) -> V | Exception:
    # An exception that leaves a task ends its group, and with it the daemon.
    try:
        return await work()
    except Exception as error:  # noqa: BLE001 (it is raised again, in every waiter)
        return error


async def run_uncancelled(work: Awaitable[R]) -> R:
    """Return what `work` gives; if we are cancelled meanwhile, let it end first.

    For what must not be left half done: a thread that writes a file, a commit.
    """
    future = asyncio.ensure_future(work)  # noqa: TID251 (its owner is this frame, which outlives it)
    try:
        await asyncio.wait((future,))
    except asyncio.CancelledError:
        await asyncio.wait((future,))
        raise
    return future.result()


@asynccontextmanager
async def background(work: Awaitable[R]) -> AsyncIterator["asyncio.Future[R]"]:
    """Do the work beside the block; at the block's end it is cancelled if need be, and waited for."""
    future = asyncio.ensure_future(work)  # noqa: TID251 (its owner is this frame, which outlives it)
    try:
        yield future
    finally:
        future.cancel()
        await run_uncancelled(asyncio.wait((future,)))
        if not future.cancelled():
            future.exception()  # who was interested has seen it


async def read_ahead(items: Iterator[R], executor: Executor) -> AsyncGenerator[R, None]:
    """Yield the pieces; each is made in `pool` while the one before is worked on."""
    loop = asyncio.get_running_loop()
    making = loop.run_in_executor(executor, next, items, None)
    try:
        while True:
            # Not `await making`: who is cancelled would cancel it, and nobody could wait for its thread.
            await asyncio.wait((making,))
            piece = making.result()
            if piece is None:
                return
            making = loop.run_in_executor(executor, next, items, None)
            yield piece
    finally:
        await run_uncancelled(asyncio.wait((making,)))
        making.exception()  # of a piece that nobody wants any more


def start_threads(count: int, thread_name_prefix: str) -> ThreadPoolExecutor:
    """Return a pool whose threads all run already, so that a limit on threads shows at the start and not later.

    Raises `ConfigError` if the system does not allow so many.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=thread_name_prefix)
    together = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(together.wait)
        together.wait()
    except RuntimeError as error:
        together.abort()
        pool.shutdown(wait=False)
        raise ConfigError(
            f"the system allows no {count} threads more for {thread_name_prefix} (raise TasksMax= of the unit, "
            "pids.max of the container, or ulimit -u)"
        ) from error
    return pool


async def run_in_thread(
    executor: Executor, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Return `work(...)`, run in `pool`. A thread cannot be cancelled, so it is waited for.

    Otherwise a task that is cancelled would close files that its thread still writes.
    """
    loop = asyncio.get_running_loop()
    return await run_uncancelled(loop.run_in_executor(executor, partial(work, *args, **kwargs)))
