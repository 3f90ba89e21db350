"""Large documents are parsed one at a time, off the loop, and their sources take turns."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from proxy.errors import TooManyRequestsError
from proxy.parsing import INLINE_PARSE_LIMIT, MAX_WAITING_DOCUMENTS, DocumentParser

LARGE = INLINE_PARSE_LIMIT + 1


@pytest.fixture
async def parser() -> AsyncIterator[DocumentParser]:
    parser = await asyncio.to_thread(DocumentParser)
    yield parser
    await asyncio.to_thread(parser.close)


@pytest.fixture
async def gate() -> AsyncIterator[threading.Event]:
    """An event for which parsers wait; it is set at the end."""
    gate = threading.Event()
    yield gate
    gate.set()


async def start(
    group: asyncio.TaskGroup, parser: DocumentParser, source: str, work: Callable[[], object]
) -> "asyncio.Task[object]":
    """Return the task that parses a document, begun or waiting."""
    task = group.create_task(parser.run(source, LARGE, work))
    await asyncio.sleep(0)
    return task


async def test_small_documents_are_parsed_at_once_and_large_ones_in_the_thread(parser):
    here = threading.current_thread().name
    assert await parser.run("a", LARGE - 1, lambda: threading.current_thread().name) == here
    assert await parser.run("a", LARGE, lambda: threading.current_thread().name) != here


async def test_one_document_is_parsed_at_a_time_and_sources_take_turns(parser, gate):
    order: list[str] = []
    running = 0

    def work(name: str) -> None:
        nonlocal running
        running += 1
        assert running == 1
        gate.wait()
        order.append(name)
        running -= 1

    async with asyncio.TaskGroup() as group:
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            _ = await start(group, parser, name[0], partial(work, name))
        gate.set()
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


async def test_an_error_is_raised_and_the_next_document_follows(parser):
    def fail() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        await parser.run("a", LARGE, fail)
    assert await parser.run("a", LARGE, lambda: 1) == 1


async def test_a_source_with_too_many_waiting_documents_is_refused_and_no_other(parser, gate):
    async with asyncio.TaskGroup() as group:
        for _ in range(1 + MAX_WAITING_DOCUMENTS):
            _ = await start(group, parser, "a", gate.wait)
        with pytest.raises(TooManyRequestsError, match="large documents of a wait"):
            await parser.run("a", LARGE, gate.wait)
        other = await start(group, parser, "b", gate.wait)
        preloads = [
            group.create_task(parser.run_for_preload(LARGE, gate.wait))
            for _ in range(2 * MAX_WAITING_DOCUMENTS)
        ]
        gate.set()
        assert await other
    assert all(one.result() for one in preloads)


async def test_cancelled_documents_lose_their_turn(parser, gate):
    parsed: list[str] = []
    async with asyncio.TaskGroup() as group:
        _ = await start(group, parser, "a", gate.wait)
        waiting = [
            await start(group, parser, "a", partial(parsed.append, name))
            for name in ("first", "second", "third")
        ]
        waiting[0].cancel()
        await asyncio.sleep(0)
        # This one is cancelled when it has its turn but has not begun.
        parser._pass_turn()
        waiting[1].cancel()
        gate.set()
    assert parsed == ["third"]
    assert await parser.run("a", LARGE, lambda: 5) == 5
