"""Which store and which configuration file a command uses, and that it makes no store by mistake."""

from importlib import import_module

import pytest

from proxy.config import Config
from proxy.storage.blobs import BlobStore
from tests.support.commands import run, run_on

READING = [
    ["images"],
    ["inspect", "app"],
    ["rm", "app"],
    ["pin", "app"],
    ["unpin", "app"],
    ["check-offline", "app"],
    ["search", "app"],
    ["export", "app", "-o", "-"],
    ["policy", "check", "app"],
    ["policy", "list"],
    ["fsck"],
    ["df"],
    ["refresh", "--all"],
    ["top"],
    ["events"],
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_command_that_fills_no_store_makes_none(command, tmp_path):
    done = run(*command, "--store", tmp_path / "typo")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"pullcache: there is no store at {tmp_path}/typo; pass its directory" in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_an_empty_directory_is_no_store_either(tmp_path):
    assert run("images", "--store", tmp_path).exit_code == 2
    assert [*tmp_path.iterdir()] == []


@pytest.fixture
def system_file(tmp_path, monkeypatch):
    """The file that packages install, here in a directory of the test, with its own store."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "pullcache.toml"
    file.write_text(f'store.path = "{tmp_path}/service"')
    for name in ("proxy.config.load", "proxy.cli.options"):
        monkeypatch.setattr(import_module(name), "SYSTEM_FILE", file)
    return file


def test_without_a_daemon_a_command_says_which_file_it_has_read(tmp_path, system_file):
    BlobStore(tmp_path / "service").close()
    done = run("images", "--json")
    assert (done.exit_code, done.stdout) == (0, "[]\n")
    assert done.stderr == (f"no daemon runs on {tmp_path}/service, the store of {system_file}\n")
    assert run("images", "--json", "-c", system_file).stderr == ""


async def test_commands_find_the_daemon_of_the_system_s_file(program, system_file):
    system_file.write_text(f'store.path = "{program.root}"')
    done = await run_on(program, "status")
    assert (done.exit_code, done.stderr) == (0, "")


def test_the_file_of_the_system_applies_to_config_show(tmp_path, system_file):
    assert f'path = "{tmp_path}/service"' in run("config", "show").stdout
    assert run("config", "show", "-c", "/dev/null").stdout.count(str(Config().store.path)) == 1
