"""The container image: built from config/container/Dockerfile by buildah, run by podman.

The tests do not depend on Docker Hub: the base is a small Debian with this machine's packages, not
the image of Python.
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
from tests.system.http_client import has_status, send_request
from tests.system.images import BuiltImage
from tests.system.processes import eventually, make_short_directory, network_environment, run
from tests.system.servers import Registry

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "config" / "container" / "Dockerfile"
BASE_PACKAGES = ("python3-venv", "dash", "coreutils", "findutils", "sed")
BASE, IMAGE = "localhost/debian", "localhost/pullcache"
STORE = "/var/cache/pullcache"

pytestmark = pytest.mark.timeout(900)  # pip downloads the packages of the image


class Engine:
    """buildah and podman with a storage in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        root, runroot = directory / "root", directory / "run"
        self._storage = ("--storage-driver", "vfs", "--root", str(root), "--runroot", str(runroot))

    def buildah(self, *arguments: str | Path) -> str:
        env = network_environment()
        return run("buildah", *self._storage, *arguments, env=env, timeout=600).strip()

    def podman(self, *arguments: str | Path) -> str:
        directories: list[str | Path] = ["--tmpdir", self._directory / "tmp"]
        directories += ["--network-config-dir", self._directory / "networks"]
        runtime = ("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none")
        return run(
            "podman", *self._storage, *directories, *runtime, *arguments, timeout=120
        ).strip()

    def build(self, root: Path) -> None:
        """Build the base from a Debian root, made at `root`, and the image from the base."""
        make_root(root, *BASE_PACKAGES)
        base = self.buildah("from", "scratch")
        self.buildah("add", base, root, "/")
        # pip may need this machine's own certificate authority; the base has it, the Dockerfile
        # does not.
        self.buildah("config", "--env", "PIP_CERT=/etc/ssl/certs/ca-certificates.crt", base)
        self.buildah("commit", "--quiet", "--rm", base, BASE)
        self.buildah(
            *("build", "--quiet", "--format", "docker", "--layers=false", "--pull-never"),
            *("--isolation", "chroot", "--network", "host", "--build-arg", f"BASE={BASE}"),
            *("--file", DOCKERFILE, "--tag", IMAGE, ROOT),
        )


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine with the image."""
    directory = make_short_directory()
    engine = Engine(directory)
    engine.build(directory / "debian")
    yield engine
    unmount_below(directory)
    shutil.rmtree(directory)


@pytest.fixture
def container(engine: Engine, upstream: Registry) -> Iterator[str]:
    """The cache in a container that can write only to its volume."""
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


def test_the_image_serves_pulls_with_a_read_only_root_and_stops_cleanly(
    engine: Engine, container: str, upstream: Registry, image: BuiltImage, directory: Path
):
    def find_address() -> str:
        match = re.search(r"http://(127\.0\.0\.1:[1-9]\d*)", engine.podman("logs", container))
        return match[1] if match else ""

    address = eventually(find_address, "the address of the container", timeout=120)
    url = f"http://{address}"
    eventually(lambda: has_status(url, "/readyz"), "readiness")

    client = Podman(directory / "client", address)
    client.start()
    client.pull(image)
    assert client.run(image).strip() == image.prints
    requests = upstream.requests()
    path = f"/v2/{image.repository}/blobs/{image.layers[-1]}"
    assert send_request(url, path).sha256 == image.layers[-1]
    assert upstream.requests() == requests

    engine.podman("healthcheck", "run", container)
    assert image.repository.rpartition("/")[2] in engine.podman(
        "exec", container, "pullcache", "images"
    )
    assert engine.podman("exec", container, "id", "-u") == "65532"
    assert engine.podman("exec", container, "sh", "-c", "echo >/etc/x || echo no") == "no"

    engine.podman("stop", "--time", "60", container)
    assert engine.podman("wait", container) == "0"


def test_the_image_has_the_documented_configuration_and_no_build_tools(engine: Engine):
    (details,) = json.loads(engine.podman("image", "inspect", IMAGE))
    config = details["Config"]
    assert config["User"] == "65532:65532"
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert config["Volumes"] == {STORE: {}}
    assert config["ExposedPorts"] == {"5000/tcp": {}}
    assert details["Healthcheck"]["Test"] == ["CMD", "pullcache", "status", "--probe"]
    files = engine.podman(
        *("run", "--rm", "--network", "none", "--entrypoint", "ls"),
        *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=1024:1024"),
        *(IMAGE, "/opt/pullcache/bin", "/opt/pullcache/lib/python3.11/site-packages"),
    ).split()
    assert {"pullcache", "proxy", "aiohttp"} <= set(files)
    assert not {"pip", "setuptools", "mypy", "pytest"} & set(files)
