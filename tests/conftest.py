"""Guards that every test runs under, and the fixtures that most of them need."""

import asyncio
import functools
import inspect
import logging
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx

from tests.fakes.content import Image
from tests.fakes.peer import close_all
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

PATIENCE = 45.0
HOUR = 3600

# A hit opens, stats and sends its file in the loop, and reads one indexed row there: each takes
# microseconds from the page cache, a hop to a thread takes more (design, section 5).
_CHEAP_ON_PURPOSE = ("os.stat", "os.statvfs", "os.sendfile")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run tests on the loop that production runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a test that hangs: uvloop swallows what pytest-timeout raises in a signal handler."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _impatient(item.obj)


def _impatient(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            await test(*args, **kwargs)

    return run


@pytest.fixture
def log_as_it_was() -> Iterator[None]:
    """Undo what configuring the log has changed."""
    level = logging.getLogger().level
    yield
    structlog.reset_defaults()
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[BlockBuster]:
    """Fail a test in which our code blocks the event loop."""
    with blockbuster_ctx("proxy") as guard:
        for name, function in guard.functions.items():
            if name.startswith("sqlite3.") or name in _CHEAP_ON_PURPOSE:
                function.deactivate()
            # Nobody is served while the program is built, or when it has ended.
            function.can_block_in("proxy/app.py", {"open_cache"})
            function.can_block_in("proxy/core.py", {"open_core"})
            # The lock of coverage's own data, which a thread may hold that is traced too.
            function.can_block_in("coverage/collector.py", "lock_data")
            function.can_block_in(
                "proxy/server/admin/listener.py", {"_bind_admin_socket", "_unlink_socket"}
            )
        yield guard


@pytest.fixture(autouse=True)
async def _no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a test that leaves a task behind."""
    before = asyncio.all_tasks()
    yield
    await close_all()
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        # A connection that was just closed may have a step to go.
        _, left = await asyncio.wait(left, timeout=1)
    assert not left, f"tasks left behind: {left}"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    """Docker Hub in small: tokens, CDN and pull limits switched on."""
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount file systems of so many bytes; needs root, as the tests of real clients do."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        subprocess.run(["mount", *options], check=True)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
async def make_program(
    registry: FakeRegistry, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Program]]]:
    """Start the program before the fake registry, with the settings given by section."""
    started: list[Program] = []

    async def make(root: Path | None = None, **sections: dict[str, Any]) -> Program:
        program = Program(root or tmp_path / "store", registry, **sections)
        await program.start()
        started.append(program)
        return program

    yield make
    for program in started:
        if program.is_running:
            await program.stop()


@pytest.fixture
async def program(make_program: Callable[..., Awaitable[Program]]) -> Program:
    """The program with the settings of `tests.support.program.SETTINGS`."""
    return await make_program()


@pytest.fixture
async def pulled(registry: FakeRegistry, program: Program) -> Image:
    """An image whose tag is in the cache and has expired."""
    image = registry.add_image()
    await program.manifest(image)
    program.clock.turn(HOUR)
    registry.requests.clear()
    return image
