"""Fixtures: the daemon as a process, with Debian's docker-registry and container clients."""

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.system.blob_server import BlobServer
from tests.system.clients import CLIENTS, Client, newer_clients
from tests.system.images import BuiltImage, make_image
from tests.system.processes import UNREACHABLE, kill_servers, make_short_directory, run
from tests.system.servers import Daemon, Registry

DIRECTORY = pytest.StashKey[Path]()
HAS_FAILED = pytest.StashKey[bool]()
SHOWN_CHARACTERS = 3000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked `each_client` with each client, or with those of the kinds that the mark names."""
    if mark := metafunc.definition.get_closest_marker("each_client"):
        root = metafunc.config.getoption("client_root", None)
        kinds = newer_clients(root) if root else CLIENTS
        kinds = [kind for kind in kinds if not mark.args or issubclass(kind, mark.args)]
        metafunc.parametrize("kind", kinds, ids=lambda kind: kind.__name__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of every server's log with a failure."""
    report = yield
    if report.failed:
        item.stash[HAS_FAILED] = True
        directory = item.stash.get(DIRECTORY, None)
        for log in sorted(directory.rglob("*.log")) if directory else ():
            if text := log.read_text(errors="replace"):
                report.sections.append((f"{log.parent.name}/{log.name}", text[-SHOWN_CHARACTERS:]))
    return report


@pytest.fixture(autouse=True)
def _no_system_certificates() -> None:
    """Leave the certificates of the system to the real programs, of which pip needs the network."""


@pytest.fixture(autouse=True)
def _no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill the servers that a failed test has left running. A test that passes must leave none."""
    yield
    left = kill_servers()
    assert not left or request.node.stash.get(HAS_FAILED, False), f"left running: {left}"


@pytest.fixture
def directory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for the test, kept only if the test fails."""
    path = make_short_directory()
    request.node.stash[DIRECTORY] = path
    yield path
    unmount_below(path)
    if not request.node.stash.get(HAS_FAILED, False):
        shutil.rmtree(path)


def unmount_below(path: Path) -> None:
    """Unmount everything below `path`: dockerd bind-mounts its data root, and may leave it mounted."""
    mounts = [Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if mount.is_relative_to(path):
            run("umount", "--lazy", mount)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    return make_image(tmp_path_factory.mktemp("image") / "hello")


@pytest.fixture
def registry(directory: Path) -> Iterator[Registry]:
    """Debian's docker-registry, empty."""
    server = Registry(directory / "registry")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def upstream(registry: Registry, image: BuiltImage) -> Registry:
    """Debian's docker-registry with `image`."""
    image.push(registry.address)
    return registry


@pytest.fixture
def blobs() -> Iterator[BlobServer]:
    """An upstream that sends blobs only as far as the test allows."""
    server = BlobServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_daemon(directory: Path) -> Iterator[Callable[..., Daemon]]:
    """Start a daemon with a new store. Each must exit with 0 and without a traceback."""
    numbers = count()

    def make(upstream: str, **options: Any) -> Daemon:
        daemon = Daemon(directory / f"daemon{next(numbers)}", upstream, **options)
        stack.callback(daemon.finish)
        daemon.start()
        return daemon

    with ExitStack() as stack:
        yield make


@pytest.fixture
def daemon(upstream: Registry, make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon with `upstream` as docker.io."""
    return make_daemon(upstream.url)


@pytest.fixture
def make_client(directory: Path, pytestconfig: pytest.Config) -> Iterator[Callable[..., Client]]:
    numbers = count()
    root = pytestconfig.getoption("client_root", None)

    def make(
        kind: type[Client], mirror: str, *, fallback: str = UNREACHABLE, only: bool = False
    ) -> Client:
        client = kind(directory / f"c{next(numbers)}", mirror, root)
        client.fallback, client.only = fallback, only
        stack.callback(client.stop)
        client.start()
        return client

    with ExitStack() as stack:
        yield make
