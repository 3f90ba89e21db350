"""All commands: imports, exit codes, usage errors and help texts."""

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from proxy import __version__
from proxy.cli import main
from proxy.cli.exit_codes import exit_code
from proxy.errors import (
    ConfigError,
    DigestMismatchError,
    NoSpaceError,
    StorageError,
    UpstreamError,
)
from tests.support.commands import run

# Runs a command and prints which slow modules it has imported.
IMPORTS_SCRIPT = """
import sys
from proxy.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"aiohttp", "prometheus_client", "rich", "structlog", "uvloop"} & {*sys.modules}))
"""


def iter_commands(command: click.Command, *names: str) -> Iterator[list[str]]:
    yield [*names]
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from iter_commands(inner, *names, name)


COMMANDS = [*iter_commands(main)]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "show"]])
def test_commands_that_do_not_need_slow_modules_do_not_import_them(arguments):
    command = [sys.executable, "-c", IMPORTS_SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
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
def test_the_class_of_an_error_determines_the_exit_code(error, code):
    assert exit_code(error) == code


def test_a_configuration_error_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    (tmp_path / "f.toml").write_text("[stor]\npath = '/x'")
    for command in (["config", "check"], ["config", "show"], ["serve"], ["fsck"]):
        done = run(*command, "-c", tmp_path / "f.toml")
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
        ["serve", "--upstream", "registry.example"],
        ["serve", "--upstream", "ghcr.io="],
        ["serve", "--upstream", "=https://ghcr.io"],
        ["serve", "--log-format", "xml"],
        ["serve", "--listen", "5000"],
        ["serve", "--max-size", "lots"],
        ["fsck", "somewhere"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_every_command_has_options_for_the_file_and_the_store(command):
    help_text = run(*command, "--help").stdout
    if command not in (["config"], ["policy"]):
        assert "-c, --config FILE" in help_text
        assert "--store DIR" in help_text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_a_help_text(command):
    help_text = run(*command, "--help").stdout
    _, _, options = help_text.partition("Options:\n")
    found: click.Command = main
    for name in command:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    assert found.help
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.split()[0] in options


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_of_commands_is_not_truncated(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for group in ((), ("config",)):
        assert "..." not in run(*group, "--help").stdout.partition("Commands:")[2]


def test_the_environment_names_the_file_for_every_command(tmp_path, monkeypatch):
    (tmp_path / "f.toml").write_text("fetch.attempts = 7")
    monkeypatch.setenv("PULLCACHE_CONFIG", str(tmp_path / "f.toml"))
    assert "attempts = 7" in run("config", "show").stdout


def test_a_closed_pipe_on_stdout_is_not_an_error():
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
