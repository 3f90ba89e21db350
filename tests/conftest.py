"""Guards that apply to every test, and the fixtures that many tests share."""

import asyncio
import functools
import inspect
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import settings

from tests.fakes.content import FakeImage
from tests.fakes.raw_client import close_all
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

# What tests/unit runs with; CI runs with more examples.
settings.register_profile("quick", max_examples=10)

# Seconds after which an asynchronous test fails.
TEST_TIMEOUT = 45.0
HOUR = 3600

# A hit opens, stats and sends its file in the event loop: from the page cache each call takes
# microseconds, less than a switch to a thread. For the same reason SQLite reads one row there.
_ALLOWED_BLOCKING_CALLS = ("os.stat", "os.statvfs", "os.sendfile")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--client-root",
        type=Path,
        help="run the container clients that are installed in this root directory",
    )


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run the tests on uvloop, as the daemon does."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End tests that hang, and mark those that need root.

    uvloop swallows what pytest-timeout raises in a signal handler.
    """
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if inspect.iscoroutinefunction(item.obj):
            item.obj = _with_timeout(item.obj)
        if "tiny_disk" in item.fixturenames:
            item.add_marker(pytest.mark.system)


def _with_timeout(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(TEST_TIMEOUT):
            await test(*args, **kwargs)

    return run


# The tests log as structlog does by default, but without Rich's tracebacks, which take long to
# render.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture
def restore_logging() -> Iterator[None]:
    """Restore after the test the settings that `configure_logging` has changed."""
    level = logging.getLogger().level
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def _no_system_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust only the certificates that a test names.

    OpenSSL takes tens of milliseconds to load those of the system, for each program that starts.
    """
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)


@pytest.fixture(autouse=True, scope="session")
def _no_blocking_calls() -> Iterator[BlockBuster]:
    """Fail the test if our code blocks the event loop."""
    with blockbuster_ctx("proxy") as guard:
        for name, function in guard.functions.items():
            if name.startswith("sqlite3.") or name in _ALLOWED_BLOCKING_CALLS:
                function.deactivate()
            # No client is served while the program is being built or after it has ended.
            function.can_block_in("proxy/app.py", {"open_cache"})
            function.can_block_in("proxy/core.py", {"open_core"})
            # The lock of coverage, which a traced thread may hold.
            function.can_block_in("coverage/collector.py", "lock_data")
            function.can_block_in(
                "proxy/server/admin/listener.py", {"_bind_admin_socket", "_unlink_socket"}
            )
        yield guard


@pytest.fixture(autouse=True)
async def _no_leaked_tasks() -> AsyncIterator[None]:
    """Fail the test if it leaves a task behind."""
    before = asyncio.all_tasks()
    yield
    await close_all()
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    if leaked:
        # A connection that was just closed may need another turn of the loop.
        _, leaked = await asyncio.wait(leaked, timeout=1)
    assert not leaked, f"tasks left behind: {leaked}"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    """A fake Docker Hub: with tokens, a CDN and a pull limit."""
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts a file system of a given size in bytes. Needs root.

    `files` is the most that it holds, 0 for no limit.
    """
    mounted: list[Path] = []

    def mount(size: int, files: int = 0) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        limits = f"size={size},nr_inodes={files},mode=0700"
        options = ["-t", "tmpfs", "-o", limits, "tmpfs", str(path)]
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
    """Return a function that starts the program in front of the fake registry.

    Keyword arguments are sections of the configuration, over the defaults of `Program`.
    """
    started: list[Program] = []

    async def make(root: Path | None = None, **sections: dict[str, Any]) -> Program:
        program = Program(root or tmp_path / "store", registry, **sections)
        await program.start()
        started.append(program)
        return program

    yield make
    # An open connection of a test would make each stop wait for IDLE_DRAIN_TIMEOUT.
    await close_all()
    for program in started:
        if program.is_running:
            await program.stop()


@pytest.fixture
async def program(make_program: Callable[..., Awaitable[Program]]) -> Program:
    """The program with the default settings of the tests (`tests.support.program.SETTINGS`)."""
    return await make_program()


@pytest.fixture
async def expired_image(registry: FakeRegistry, program: Program) -> FakeImage:
    """An image that was pulled an hour ago, so that its cached tag has expired."""
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(HOUR)
    registry.requests.clear()
    return image
