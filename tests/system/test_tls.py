"""Real clients over TLS with a private authority and a login; what stalled ones cost."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.system.images import Image
from tests.system.processes import Process, run
from tests.system.servers import Registry


@pytest.fixture
def authority(place: Path) -> Authority:
    return Authority(place / "certs.d")


@pytest.fixture
def address(upstream: Registry, authority: Authority, place: Path) -> Iterator[str]:
    """A daemon that speaks https and knows amy, whose password is `secret`."""
    certificate, key = authority.issue("local", "IP:127.0.0.1")
    users = place / "users"
    run("htpasswd", "-B", "-b", "-c", users, "amy", "secret")
    env = {
        "PULLCACHE_SERVER_TLS_CERTIFICATE": certificate,
        "PULLCACHE_SERVER_TLS_KEY": key,
        "PULLCACHE_SERVER_HTPASSWD": str(users),
    }
    command = [sys.executable, "-m", "proxy", "serve", "--listen", "127.0.0.1:0"]
    options = ["--store", str(place / "store"), "--upstream", f"docker.io={upstream.url}"]
    process = Process(place, "daemon", [*command, *options], env=env)

    def announced() -> str:
        found = re.search(r"https://(127\.0\.0\.1:[1-9]\d*)", process.out.read_text())
        return found[1] if found else ""

    yield process.wait_until(announced, "its announcement")
    assert process.stop() == 0


def test_skopeo_pulls_over_tls_with_a_login_and_not_without(
    address: str, image: Image, authority: Authority, place: Path
):
    source = f"docker://{address}/{image.repository}:{image.tag}"
    options: list[str | Path] = ["--src-cert-dir", authority.certs]
    target = f"oci:{place}/out"
    with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
        run("skopeo", "copy", *options, source, target)
    run("skopeo", "copy", *options, "--src-creds", "amy:secret", source, target)
    with pytest.raises(AssertionError, match=r"x509|certificate"):
        run("skopeo", "copy", "--src-creds", "amy:secret", source, target)


def test_podman_logs_in_and_pulls_over_tls(
    address: str, image: Image, authority: Authority, place: Path
):
    podman: list[str | Path] = [
        "podman",
        "--root",
        place / "p",
        "--runroot",
        place / "r",
        "--storage-driver",
        "vfs",
    ]
    options: list[str | Path] = ["--cert-dir", authority.certs, "--authfile", place / "auth.json"]
    run(*podman, "login", *options, "-u", "amy", "-p", "secret", address)
    run(*podman, "pull", *options, f"{address}/{image.repository}:{image.tag}")
