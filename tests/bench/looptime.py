"""How long evictions keep the event loop: the daemon's own parts on a full store, nothing beside them.

    python -m tests.bench.looptime STORE TIMES BLOBS

Makes room `TIMES` times for `BLOBS` layers of the store and prints the milliseconds of each, as JSON: those in
which the loop could do nothing else, all together and the longest stretch, and those that passed.
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
from tests.bench.filled import LAYER_SIZE


class Clocked:
    """Makes tasks that note how long each of their steps keeps the loop."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, *, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        return asyncio.Task(_Steps(coro, self.steps), loop=loop, context=context)


class _Steps(Coroutine[Any, Any, Any]):
    def __init__(self, inner: Coroutine[Any, Any, Any], steps: list[float]) -> None:
        self._inner = inner
        self._steps = steps

    def send(self, value: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._inner.send(value)
        finally:
            self._steps.append(time.perf_counter() - began)

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
    found = []
    try:
        await space.open()
        clocked = Clocked()
        asyncio.get_running_loop().set_task_factory(clocked.task)
        for _ in range(times):
            space.max_size = space.used_bytes + INDEX_MARGIN
            clocked.steps.clear()
            began, before = time.perf_counter(), space.blob_count
            made = await asyncio.get_running_loop().create_task(space.reserve(blobs * LAYER_SIZE))
            passed = time.perf_counter() - began
            assert made, "no room"
            assert space.blob_count <= before - blobs, "nothing was evicted"
            space.release(made)
            steps = clocked.steps
            found.append({"loop": sum(steps), "longest": max(steps), "passed": passed})
    finally:
        index.close()
        store.close()
    return [{name: seconds * 1e3 for name, seconds in one.items()} for one in found]


def main() -> None:
    found = uvloop.run(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
