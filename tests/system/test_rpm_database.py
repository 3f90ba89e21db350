"""The database that Debian's rpm writes is read."""

import io
import subprocess
from pathlib import Path

import pytest

from proxy.contents.layers.layer import read_layer
from proxy.contents.packages import Package
from tests.support.layers import make_tar

pytestmark = [pytest.mark.system]

SPEC = """\
Name: openssl-libs
Version: 3.0.7
Release: 27.el9
Epoch: 1
Summary: x
License: x
BuildArch: noarch
%description
x
%files
"""


def test_the_database_of_rpm_itself_is_read(tmp_path: Path) -> None:
    spec, root = tmp_path / "x.spec", tmp_path / "root"
    spec.write_text(SPEC)
    try:
        run("rpmbuild", "-bb", "--define", f"_topdir {tmp_path}/top", spec)
    except FileNotFoundError:
        pytest.skip("needs Debian's rpm: apt install rpm")
    (package,) = (tmp_path / "top").rglob("*.noarch.rpm")
    root.mkdir()
    options: list[str | Path] = [
        "--root",
        root,
        "--define",
        "_db_backend sqlite",
        "--dbpath",
        "/var/lib/rpm",
    ]
    run("rpm", *options, "--initdb")
    run("rpm", *options, "--install", "--nodeps", "--justdb", "--noscripts", package)
    path = "var/lib/rpm/rpmdb.sqlite"
    found = read_layer(io.BytesIO(make_tar({path: (root / path).read_bytes()})))
    (file,) = found.files
    assert file.problem == ""
    assert file.packages == [Package("rpm", "openssl-libs", "1:3.0.7-27.el9", "noarch", path=path)]


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
