"""Parsing of documents from outside: small ones at once, large ones in one thread.

Threads share the interpreter, so several parsers at once would finish no earlier; they would only hold
up the event loop for longer, and each takes many times the memory of its document.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from proxy.concurrency import run_in_thread, start_threads
from proxy.errors import TooManyRequestsError

P = ParamSpec("P")
R = TypeVar("R")

# Larger documents are parsed in the thread, in bytes: 4 MiB of hostile JSON take a second.
INLINE_PARSE_LIMIT = 64 << 10
# Large documents of one source that wait for the thread; each is in memory meanwhile.
MAX_WAITING_DOCUMENTS = 16


class DocumentParser:
    """Parses documents. Large ones take turns by their source, such as an upstream."""

    def __init__(self) -> None:
        self._thread = start_threads(1, "parser")
        self._is_busy = False
        self._turns: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def close(self) -> None:
        """End the thread, after the document that it parses."""
        self._thread.shutdown()

    async def run(
        self, source: str, size: int, parse: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Return `parse(...)`, which reads a document of `size` bytes.

        Raises `TooManyRequestsError` if `MAX_WAITING_DOCUMENTS` of the source wait already.
        """
        waiting = sum(not one.done() for one in self._turns.get(source, ()))
        if size > INLINE_PARSE_LIMIT and waiting >= MAX_WAITING_DOCUMENTS:
            raise TooManyRequestsError(
                f"too many large documents of {source} wait to be read; try again in a moment"
            )
        return await self._run(source, size, partial(parse, *args, **kwargs))

    async def run_for_preload(
        self, size: int, parse: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Do what `run` does, without its limit on waiting documents: a preload bounds them itself."""
        return await self._run("preloads", size, partial(parse, *args, **kwargs))

    async def _run(self, source: str, size: int, parse: Callable[[], R]) -> R:
        if size <= INLINE_PARSE_LIMIT:
            return parse()
        if self._is_busy:
            await self._wait_for_turn(source)
        self._is_busy = True
        try:
            return await run_in_thread(self._thread, parse)
        finally:
            self._pass_turn()

    async def _wait_for_turn(self, source: str) -> None:
        turns = self._turns.setdefault(source, deque())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turns.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_turn()
            raise

    def _pass_turn(self) -> None:
        """Let the document pass whose source has waited longest since its last turn."""
        while self._turns:
            source, turns = self._turns.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._turns[source] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._is_busy = False
