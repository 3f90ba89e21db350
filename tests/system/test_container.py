"""The container image: built of config/container/Dockerfile by buildah, run by podman as its users would.

Docker Hub's Python is not to be had here, so it stands on a small Debian made of this machine's packages.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import Podman
from tests.system.conftest import unmount_below
from tests.system.debian import make_root
from tests.system.images import Image
from tests.system.processes import eventually, open_to_pip, run, short_directory
from tests.system.servers import Registry
from tests.system.wire import answers, ask

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "config" / "container" / "Dockerfile"
PYTHON = ("python3-venv", "dash", "coreutils", "findutils", "sed")
BASE, IMAGE = "localhost/debian", "localhost/pullcache"
STORE = "/var/cache/pullcache"

pytestmark = pytest.mark.timeout(900)  # pip fetches what the image carries


class Engine:
    """buildah and podman on a storage of their own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        root, runs = directory / "root", directory / "run"
        self._storage = ("--storage-driver", "vfs", "--root", str(root), "--runroot", str(runs))

    def buildah(self, *arguments: str | Path) -> str:
        env = open_to_pip()
        return run("buildah", *self._storage, *arguments, env=env, timeout=600).strip()

    def podman(self, *arguments: str | Path) -> str:
        places: list[str | Path] = ["--tmpdir", self._directory / "tmp"]
        places += ["--network-config-dir", self._directory / "networks"]
        runtime = ("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none")
        return run("podman", *self._storage, *places, *runtime, *arguments, timeout=120).strip()

    def build(self, scratch: Path) -> None:
        make_root(scratch, *PYTHON)
        base = self.buildah("from", "scratch")
        self.buildah("add", base, scratch, "/")
        # A certificate authority of this machine's network, if it has one, is the base's business.
        self.buildah("config", "--env", "PIP_CERT=/etc/ssl/certs/ca-certificates.crt", base)
        self.buildah("commit", "--quiet", "--rm", base, BASE)
        self.buildah(
            *("build", "--quiet", "--format", "docker", "--layers=false", "--pull-never"),
            *("--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={BASE}"),
            *("--file", DOCKERFILE, "--tag", IMAGE, ROOT),
        )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that has the image."""
    directory = short_directory()
    engine = Engine(directory)
    engine.build(directory / "debian")
    yield engine
    unmount_below(directory)
    shutil.rmtree(directory)


@pytest.fixture
def container(engine: Engine, upstream: Registry) -> Iterator[str]:
    """The cache in a container in which nothing but its volume can be written."""
    name = "cache"
    engine.podman(
        *("run", "--detach", "--name", name, "--network", "host"),
        *("--read-only", "--read-only-tmpfs=false"),
        *("--cap-drop", "all", "--security-opt", "no-new-privileges"),
        *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=1024:1024"),
        *("--env", "PULLCACHE_SERVER_LISTEN=127.0.0.1:0"),
        *("--env", f"PULLCACHE_UPSTREAMS_DOCKER_IO_URL={upstream.url}"),
        *("--env", "PULLCACHE_STORE_MIN_FREE=0B"),
        *("--volume", f"pullcache:{STORE}", IMAGE),
    )
    yield name
    engine.podman("rm", "--force", "--volumes", name)


def test_the_image_serves_pulls_with_a_read_only_root_and_ends_well(
    engine: Engine, container: str, upstream: Registry, image: Image, place: Path
):
    def listening() -> str:
        found = re.search(r"http://(127\.0\.0\.1:[1-9]\d*)", engine.podman("logs", container))
        return found[1] if found else ""

    address = eventually(listening, "the address of the container", deadline=120)
    url = f"http://{address}"
    eventually(lambda: answers(url, "/readyz"), "readiness")

    client = Podman(place / "client", address)
    client.start()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    asked = upstream.requests()
    path = f"/v2/{image.repository}/blobs/{image.layers[-1]}"
    assert ask(url, path).sha256 == image.layers[-1]
    assert upstream.requests() == asked

    engine.podman("healthcheck", "run", container)
    assert image.repository.rpartition("/")[2] in engine.podman(
        "exec", container, "pullcache", "images"
    )
    assert engine.podman("exec", container, "id", "-u") == "65532"
    assert engine.podman("exec", container, "sh", "-c", "echo >/etc/x || echo no") == "no"

    engine.podman("stop", "--time", "60", container)
    assert engine.podman("wait", container) == "0"


def test_the_image_says_how_it_is_run_and_carries_no_build_tools(engine: Engine):
    (described,) = json.loads(engine.podman("image", "inspect", IMAGE))
    config = described["Config"]
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert config["Volumes"] == {STORE: {}}
    assert config["ExposedPorts"] == {"5000/tcp": {}}
    assert described["Healthcheck"]["Test"] == [*("CMD", "pullcache", "status", "--probe")]
    listed = engine.podman(
        *("run", "--rm", "--network", "none", "--entrypoint", "ls"),
        *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=1024:1024"),
        *(IMAGE, "/opt/pullcache/bin", "/opt/pullcache/lib/python3.11/site-packages"),
    ).split()
    assert {"pullcache", "proxy", "aiohttp"} <= set(listed)
    assert not {"pip", "setuptools", "mypy", "pytest"} & set(listed)
