"""Real clients over TLS, with a private certificate authority and a login."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.system.images import BuiltImage
from tests.system.processes import Process, run
from tests.system.servers import Registry


@pytest.fixture
def authority(directory: Path) -> Authority:
    return Authority(directory / "certs.d")


@pytest.fixture
def address(upstream: Registry, authority: Authority, directory: Path) -> Iterator[str]:
    """The address of a daemon with TLS and the user amy, whose password is `secret`."""
    certificate, key = authority.issue("local", "IP:127.0.0.1")
    users = directory / "users"
    run("htpasswd", "-B", "-b", "-c", users, "amy", "secret")
    env = {
        "PULLCACHE_SERVER_TLS_CERTIFICATE": certificate,
        "PULLCACHE_SERVER_TLS_KEY": key,
        "PULLCACHE_SERVER_HTPASSWD": str(users),
    }
    command = [sys.executable, "-m", "proxy", "serve", "--listen", "127.0.0.1:0"]
    options = ["--store", str(directory / "store"), "--upstream", f"docker.io={upstream.url}"]
    process = Process(directory, "daemon", [*command, *options], env=env)

    def find_address() -> str:
        match = re.search(r"https://(127\.0\.0\.1:[1-9]\d*)", process.stdout_log.read_text())
        return match[1] if match else ""

    yield process.wait_until(find_address, "its address")
    assert process.stop() == 0


def test_skopeo_pulls_over_tls_only_with_login_and_trusted_certificate(
    address: str, image: BuiltImage, authority: Authority, directory: Path
):
    source = f"docker://{address}/{image.repository}:{image.tag}"
    options: list[str | Path] = ["--src-cert-dir", authority.certs]
    target = f"oci:{directory}/out"
    with pytest.raises(AssertionError, match=r"unauthorized|authentication required"):
        run("skopeo", "copy", *options, source, target)
    run("skopeo", "copy", *options, "--src-creds", "amy:secret", source, target)
    with pytest.raises(AssertionError, match=r"x509|certificate"):
        run("skopeo", "copy", "--src-creds", "amy:secret", source, target)


def test_podman_logs_in_and_pulls_over_tls(
    address: str, image: BuiltImage, authority: Authority, directory: Path
):
    podman: list[str | Path] = [
        "podman",
        "--root",
        directory / "p",
        "--runroot",
        directory / "r",
        "--storage-driver",
        "vfs",
    ]
    options: list[str | Path] = [
        "--cert-dir",
        authority.certs,
        "--authfile",
        directory / "auth.json",
    ]
    run(*podman, "login", *options, "-u", "amy", "-p", "secret", address)
    run(*podman, "pull", *options, f"{address}/{image.repository}:{image.tag}")
