"""Starts the worker, one at a time, and takes its answer."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

import proxy
from proxy.concurrency import run_in_thread, start_threads
from proxy.contents.answer import WorkerAnswer
from proxy.contents.program import run_program
from proxy.errors import ContentsError
from proxy.storage.blobs import OpenBlob

# Seconds that the worker may take for one file in all, and bytes of its answer: a hundred thousand packages have
# about 20 MB.
MAX_WORKER_WALL_SECONDS = 900.0
MAX_WORKER_ANSWER_SIZE = 64 << 20

R = TypeVar("R")

WorkerKind = Literal["layer", "sbom", "report"]

# The worker ignores PYTHONPATH and the working directory, so it is told where the program is.
_START = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('proxy.contents.worker', run_name='__main__')"
_ROOT = str(Path(proxy.__file__).parents[1])
# Killed for its limits: CPU time, or memory that the interpreter itself could not get.
_STATUS_HINTS = {
    -24: "it takes too much CPU time",
    -9: "it was killed",
    -11: "it crashed",
    1: "it failed",
}


class ContentsWorker:
    """The threads that start workers and scanners, one of each at a time, and wait for them."""

    def __init__(self) -> None:
        self._threads = start_threads(2, "contents")
        self._stopping = threading.Event()
        self._turn = asyncio.Lock()
        self._scanner_turn = asyncio.Lock()

    def stop(self) -> None:
        """End the worker that runs, and start no more."""
        self._stopping.set()

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        self._threads.shutdown()

    @property
    def is_closing(self) -> bool:
        """Whether nothing is read any more."""
        return self._stopping.is_set()

    async def read(self, kind: WorkerKind, blob: OpenBlob) -> WorkerAnswer:
        """Return what is in a layer, an SBOM or a report; the caller closes the blob. Raises `ContentsError`."""
        async with self._turn:
            if self.is_closing:
                raise ContentsError(f"the {kind} is not read, because pullcache stops")
            return await run_in_thread(self._threads, self._read, kind, blob)

    async def run_scanner(self, work: Callable[..., R], *args: object) -> R:
        """Return `work(stopping, ...)`, which runs a scanner and ends if `stopping` is set.

        Raises what it raises, and `ContentsError`.
        """
        async with self._scanner_turn:
            if self.is_closing:
                raise ContentsError("nothing is scanned, because pullcache stops")
            return await run_in_thread(self._threads, work, self._stopping, *args)

    def _read(self, kind: WorkerKind, blob: OpenBlob) -> WorkerAnswer:
        os.lseek(blob.fd, 0, os.SEEK_SET)
        environment = {"LC_ALL": "C.UTF-8"}
        done = run_program(
            [sys.executable, "-I", "-c", _START, _ROOT, kind],
            stdin=blob.fd,
            timeout=MAX_WORKER_WALL_SECONDS,
            max_output=MAX_WORKER_ANSWER_SIZE,
            stopping=self._stopping,
            environment=environment,
        )
        if done.status:
            hint = _STATUS_HINTS.get(done.status, f"it ended with status {done.status}")
            raise ContentsError(f"the {kind} could not be read: {hint}")
        try:
            return msgspec.json.decode(done.output, type=WorkerAnswer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ContentsError(f"the {kind} could not be read: invalid answer") from error
