"""The commands as a whole: what they import, how they fail, what they say of themselves."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from proxy import __version__
from proxy.cli import main
from proxy.cli.errors import exit_code
from proxy.errors import (
    ConfigError,
    DigestMismatchError,
    NoSpaceError,
    StorageError,
    UpstreamError,
)

ASK = """
import sys
from proxy.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"aiohttp", "prometheus_client", "rich", "structlog", "uvloop"} & {*sys.modules}))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "show"]])
def test_a_command_that_is_not_the_daemon_does_not_wait_for_its_imports(arguments):
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_proxy_is_pullcache():
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"pullcache, version {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DigestMismatchError("x"), 3),
        (StorageError("x"), 1),
        (NoSpaceError("x"), 1),
        (UpstreamError("x"), 1),
        (PermissionError(13, "Permission denied", "/x"), 1),
        (KeyError("a bug"), None),
    ],
)
def test_an_error_has_the_exit_code_of_its_class(error, code):
    assert exit_code(error) == code


def test_a_configuration_error_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    (tmp_path / "f.toml").write_text("[stor]\npath = '/x'")
    for command in (["config", "check"], ["config", "show"], ["serve"], ["fsck"]):
        done = CliRunner().invoke(main, [*command, "-c", str(tmp_path / "f.toml")])
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr == (
            f"pullcache: {tmp_path}/f.toml: stor: no such key (did you mean store?)\n"
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["serv"],
        ["serve", "--nonsense"],
        ["serve", "--upstream", "ghcr.io"],
        ["serve", "--upstream", "=https://ghcr.io"],
        ["serve", "--log-format", "xml"],
        ["serve", "--listen", "5000"],
        ["serve", "--max-size", "lots"],
        ["fsck", "somewhere"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [["serve"], ["fsck"], ["config", "check"], ["config", "show"], ["config", "schema"]],
)
def test_every_command_can_be_told_the_file_and_the_store(command):
    help_text = CliRunner().invoke(main, [*command, "--help"]).stdout
    assert "--config" in help_text
    assert "--store" in help_text


def test_the_environment_names_the_file_for_every_command(tmp_path, monkeypatch):
    (tmp_path / "f.toml").write_text("fetch.attempts = 7")
    monkeypatch.setenv("PULLCACHE_CONFIG", str(tmp_path / "f.toml"))
    assert "attempts = 7" in CliRunner().invoke(main, ["config", "show"]).stdout


def test_a_reader_that_has_seen_enough_is_no_error_worth_a_word():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "proxy", "config", "show"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert done.stderr == b""
