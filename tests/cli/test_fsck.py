"""`pullcache fsck` on a store of real files."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from tests.support.commands import run


def put(store: Path, content: bytes, *, named_as: bytes | None = None) -> Path:
    name = hashlib.sha256(content if named_as is None else named_as).hexdigest()
    path = store / "blobs" / "sha256" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    put(tmp_path / "store", b"one layer")
    put(tmp_path / "store", b"another layer")
    return tmp_path / "store"


def fsck(store: Path, *arguments: str) -> Result:
    return run("fsck", "--store", store, *arguments)


def test_an_intact_store_is_exit_code_0(store):
    done = fsck(store)
    assert done.exit_code == 0, done.output
    assert "2 blobs (22 B) verified, 2 indexed: no corruption found\n" in done.stdout


def test_a_corrupt_blob_is_named_and_removed_and_the_exit_code_is_3(store):
    corrupt = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store)
    assert done.exit_code == 3, done.output
    assert corrupt.name in done.stdout
    assert "1 indexed: 1 corrupt, removed\n" in done.stdout
    assert not corrupt.exists()
    assert fsck(store).exit_code == 0


def test_a_dry_run_changes_nothing(store):
    corrupt = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store, "--dry-run")
    assert done.exit_code == 3, done.output
    assert corrupt.name in done.stdout
    assert "1 corrupt, not removed\n" in done.stdout
    assert corrupt.read_bytes() == b"one lay\x01r"


def test_with_json_stdout_is_one_document(store):
    corrupt = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store, "--json")
    report = json.loads(done.stdout)
    (found,) = report.pop("corrupt")
    assert corrupt.name in found["path"]
    assert found["reason"]
    assert report == {"checked": 2, "bytes": 22, "indexed": 1, "removed": True}
    assert done.exit_code == 3


def test_a_terminal_on_stderr_shows_a_bar_while_stdout_stays_json(store):
    controller, terminal = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "fsck", "--store", store, "--json"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        check=True,
    )
    os.close(terminal)
    shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "verifying" in shown
    assert json.loads(done.stdout)["checked"] == 2


def test_progress_goes_to_stderr(store):
    done = fsck(store)
    assert "verifying: 100 %" in done.stderr
    assert "100 %" not in done.stdout
