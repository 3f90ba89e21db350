"""The wheel: built, installed into a fresh environment, and used there."""

import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from proxy import __version__
from tests.system.http_client import send_request
from tests.system.processes import network_environment, run
from tests.system.servers import Daemon, Registry

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "config" / "requirements" / "runtime.txt"

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]  # pip downloads the requirements


class InstalledDaemon(Daemon):
    """`pullcache serve` of an environment."""

    environment: Path

    @property
    def program(self) -> Sequence[str]:
        return [str(self.environment / "bin" / "pullcache")]


def test_the_wheel_gives_a_working_pullcache(upstream: Registry, directory: Path):
    network = network_environment()
    python, environment = sys.executable, directory / "venv"
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory)
    run(python, *build, ROOT, env=network, timeout=300)
    (wheel,) = directory.glob("pullcache-*.whl")
    assert wheel.name == f"pullcache-{__version__}-py3-none-any.whl"
    run(python, "-m", "venv", environment, timeout=120)
    install: tuple[str | Path, ...] = (environment / "bin" / "pip", "install", "--quiet")
    run(*install, "--require-hashes", "--requirement", LOCK, env=network, timeout=600)
    run(*install, "--no-deps", wheel, env=network, timeout=120)
    program = environment / "bin" / "pullcache"
    assert run(program, "--version") == f"pullcache, version {__version__}\n"
    assert "[server]" in run(program, "config", "show", "-c", "/dev/null")
    daemon = InstalledDaemon(directory / "daemon", upstream.url)
    daemon.environment = environment
    daemon.start()
    assert send_request(daemon.url, "/v2/").status == 200
    assert '"state": "serving"' in run(program, "status", "--json", "--store", daemon.store)
    # The templates of the pages, too, are in the wheel.
    link = urlsplit(run(program, "ui", "--no-browser", "--store", daemon.store).split()[0])
    shown = send_request(f"http://{link.netloc}", f"{link.path}?{link.query}")
    assert shown.status == 303
    cookie = shown.headers["Set-Cookie"].partition(";")[0]
    page = send_request(f"http://{link.netloc}", "/", headers={"Cookie": cookie})
    assert b"Nothing is cached yet" in page.body
    assert daemon.stop() == 0
