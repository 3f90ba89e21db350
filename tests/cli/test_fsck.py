"""`pullcache fsck` on a store of real files."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main


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
    return CliRunner().invoke(main, ["fsck", "--store", str(store), *arguments])


def test_a_sound_store_is_exit_code_0(store):
    done = fsck(store)
    assert done.exit_code == 0, done.output
    assert "2 blobs (22 B) read, 2 in the index: all right\n" in done.stdout


def test_a_bad_blob_is_named_and_removed_and_the_exit_code_is_3(store):
    bad = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store)
    assert done.exit_code == 3, done.output
    assert bad.name in done.stdout
    assert "1 bad, removed" in done.stdout
    assert not bad.exists()
    assert fsck(store).exit_code == 0


def test_a_dry_run_changes_nothing(store):
    bad = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store, "--dry-run")
    assert done.exit_code == 3, done.output
    assert bad.name in done.stdout
    assert "1 bad, left where they are" in done.stdout
    assert bad.read_bytes() == b"one lay\x01r"


def test_json_is_the_whole_of_stdout(store):
    bad = put(store, b"one lay\x01r", named_as=b"one layer")
    done = fsck(store, "--json")
    report = json.loads(done.stdout)
    (corrupt,) = report.pop("corrupt")
    assert bad.name in corrupt["path"]
    assert corrupt["reason"]
    assert report == {"checked": 2, "bytes": 22, "indexed": 1, "removed": True}
    assert done.exit_code == 3


def test_a_terminal_gets_a_bar_and_stdout_stays_data(store):
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "fsck", "--store", store, "--json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "reading" in shown
    assert json.loads(done.stdout)["checked"] == 2


def test_progress_goes_to_stderr(store):
    done = fsck(store)
    assert "read 100 %" in done.stderr
    assert "read 100 %" not in done.stdout
