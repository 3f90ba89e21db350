"""Fixtures with real parts: the daemon as a process, Debian's registry and clients around it."""

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.system.blobserver import BlobServer
from tests.system.clients import Client
from tests.system.images import Image, make_image
from tests.system.processes import run, short_directory
from tests.system.servers import Daemon, Registry

PLACE = pytest.StashKey[Path]()
FAILED = pytest.StashKey[bool]()
TAIL = 3000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every server's log with a failure."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        place = item.stash.get(PLACE, None)
        for log in sorted(place.rglob("*.log")) if place else ():
            if text := log.read_text(errors="replace"):
                report.sections.append((f"{log.parent.name}/{log.name}", text[-TAIL:]))
    return report


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of the test's own; kept only when the test failed."""
    path = short_directory()
    request.node.stash[PLACE] = path
    yield path
    unmount_below(path)
    if not request.node.stash.get(FAILED, False):
        shutil.rmtree(path)


def unmount_below(path: Path) -> None:
    """Undo what a client left mounted: dockerd binds its data root, and may end with it bound."""
    points = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines()]
    for point in sorted(points, reverse=True):
        if point.is_relative_to(path):
            run("umount", "--lazy", point)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("image") / "hello")


@pytest.fixture
def registry(place: Path) -> Iterator[Registry]:
    """Debian's docker-registry, empty."""
    server = Registry(place / "registry")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def upstream(registry: Registry, image: Image) -> Registry:
    """Debian's docker-registry with `image` in it."""
    image.push(registry.address)
    return registry


@pytest.fixture
def blobs() -> Iterator[BlobServer]:
    """An upstream whose pace the test sets."""
    server = BlobServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_daemon(place: Path) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon with a store of its own; each must end well."""
    numbers = count()

    def make(upstream: str, **options: Any) -> Daemon:
        daemon = Daemon(place / f"daemon{next(numbers)}", upstream, **options)
        stack.callback(daemon.finish)
        daemon.start()
        return daemon

    with ExitStack() as stack:
        yield make


@pytest.fixture
def daemon(upstream: Registry, make_daemon: Callable[..., Daemon]) -> Daemon:
    """pullcache in front of `upstream`."""
    return make_daemon(upstream.url)


@pytest.fixture
def make_client(place: Path) -> Iterator[Callable[[type[Client], str], Client]]:
    numbers = count()

    def make(kind: type[Client], mirror: str) -> Client:
        client = kind(place / f"c{next(numbers)}", mirror)
        stack.callback(client.stop)
        client.start()
        return client

    with ExitStack() as stack:
        yield make
