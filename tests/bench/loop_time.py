"""Measures how long evictions block the event loop, with the daemon's own space manager on a full store.

    python -m tests.bench.loop_time STORE TIMES BLOBS

Makes room for `BLOBS` layers, `TIMES` times, and prints for each the milliseconds as JSON: `loop`, in which the
event loop was blocked, `longest`, the longest block, and `elapsed`.
"""

import asyncio
import json
import sys
import time
from collections.abc import Coroutine, Generator
from contextvars import Context
from pathlib import Path
from typing import Any

import uvloop

from proxy.metrics import Metrics
from proxy.storage.blobs import BlobStore
from proxy.storage.index import Index
from proxy.storage.space import INDEX_MARGIN, SpaceManager
from tests.bench.filled_store import LAYER_SIZE


class TimingTaskFactory:
    """Makes tasks that record how long each of their steps runs."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coro: Any, *, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        return asyncio.Task(_TimedCoroutine(coro, self.steps), loop=loop, context=context)


class _TimedCoroutine(Coroutine[Any, Any, Any]):
    def __init__(self, inner: Coroutine[Any, Any, Any], steps: list[float]) -> None:
        self._inner = inner
        self._steps = steps

    def send(self, value: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._inner.send(value)
        finally:
            self._steps.append(time.perf_counter() - started)

    def throw(self, *error: Any) -> Any:
        return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()


async def measure(root: Path, times: int, blobs: int) -> list[dict[str, float]]:
    store = BlobStore(root)
    index = Index(root / "index.sqlite", time.time)
    metrics = Metrics({}, "")
    space = SpaceManager(store, index, metrics, max_size=1 << 60, min_free=0, clock=time.time)
    evictions = []
    try:
        await space.open()
        factory = TimingTaskFactory()
        asyncio.get_running_loop().set_task_factory(factory)
        for _ in range(times):
            space.max_size = space.used_bytes + INDEX_MARGIN
            factory.steps.clear()
            started, before = time.perf_counter(), space.blob_count
            reservation = await asyncio.get_running_loop().create_task(
                space.reserve(blobs * LAYER_SIZE)
            )
            elapsed = time.perf_counter() - started
            assert reservation, "nothing was reserved"
            assert space.blob_count <= before - blobs, "nothing was evicted"
            space.release(reservation)
            steps = factory.steps
            evictions.append({"loop": sum(steps), "longest": max(steps), "elapsed": elapsed})
    finally:
        index.close()
        store.close()
    return [{name: seconds * 1e3 for name, seconds in one.items()} for one in evictions]


def main() -> None:
    evictions = uvloop.run(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(evictions) + "\n")


if __name__ == "__main__":
    main()
