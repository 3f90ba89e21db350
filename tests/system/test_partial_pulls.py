"""podman's partial pulls: of a layer in zstd:chunked it requests the chunks that its store lacks.

It asks for many ranges at once. The clients are those of tests/newer-clients; without them the test is
skipped.
"""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.processes import run
from tests.system.servers import Daemon, Registry

STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{directory}/root"
runroot = "{directory}/run"
[storage.options.pull_options]
enable_partial_images = "true"
"""
FILES = 120
SIZE = 60_000
CHANGED = range(5, FILES, 11)
NAME = "me/chunked"


class PartialPodman:
    """podman in a root of tests/newer-clients, with a store of its own in `directory`."""

    def __init__(self, root: Path, directory: Path) -> None:
        directory.mkdir()
        self._root = root
        self._directory = directory
        self._config = directory / "storage.conf"
        self._config.write_text(STORAGE.format(directory=directory))

    def run(self, *arguments: str | Path) -> str:
        options = ["--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        options += ["--tmpdir", str(self._directory / "tmp")]
        env = {"CONTAINERS_STORAGE_CONF": str(self._config)}
        return run("chroot", self._root, "podman", *options, *arguments, env=env)

    def push(self, archive: Path, name: str) -> None:
        self.run("import", archive, "localhost/pushed")
        options = ("--tls-verify=false", "--compression-format", "zstd:chunked")
        self.run("push", *options, "localhost/pushed", name)

    def pull(self, name: str) -> dict[str, bytes]:
        """Pull an image and return its files."""
        self.run("pull", "--quiet", "--tls-verify=false", name)
        mounted = self._root / self.run("image", "mount", name).strip().lstrip("/")
        files = {path.name: path.read_bytes() for path in mounted.rglob("file*")}
        self.run("image", "umount", name)
        return files


@pytest.fixture
def make_podman(directory: Path, pytestconfig: pytest.Config) -> Callable[[str], PartialPodman]:
    root = pytestconfig.getoption("client_root", None)
    if not root:
        pytest.skip(
            "podman 4.3 of Debian 12 cannot pull partially: tests/newer-clients runs this with podman 5"
        )
    return lambda name: PartialPodman(root, directory / name)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_podman_pulls_the_chunks_that_it_lacks_through_the_cache(
    registry: Registry,
    make_daemon: Callable[..., Daemon],
    directory: Path,
    make_podman: Callable[[str], PartialPodman],
):
    source = random.Random(1)
    first = {f"file{number}": source.randbytes(SIZE) for number in range(FILES)}
    second = first | {f"file{number}": source.randbytes(SIZE) for number in CHANGED}
    pushing = make_podman("pushing")
    for version, files in {"v1": first, "v2": second}.items():
        write_archive(directory / f"{version}.tar", files)
        pushing.push(directory / f"{version}.tar", f"{registry.address}/{NAME}:{version}")
    daemon = make_daemon(registry.url)
    for state in ("cold", "warm", "upstream down"):
        if state == "upstream down":
            registry.stop()
        podman = make_podman(state.replace(" ", "-"))
        assert podman.pull(f"{daemon.address}/{NAME}:v1") == first, state
        before = daemon.metric("pullcache_response_bytes_total")
        assert podman.pull(f"{daemon.address}/{NAME}:v2") == second, state
        sent = daemon.metric("pullcache_response_bytes_total") - before
        assert len(CHANGED) * SIZE < sent < 2 * len(CHANGED) * SIZE, state
