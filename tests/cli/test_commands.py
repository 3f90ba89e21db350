"""All commands: imports, exit codes, usage errors and help texts."""

import itertools
import os
import re
import shlex
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
GROUPED = {command[1] for command in COMMANDS if len(command) == 2}


def find(arguments: list[str]) -> click.Command:
    """Return the command of these names."""
    found: click.Command = main
    for name in arguments:
        assert isinstance(found, click.Group)
        found = found.commands[name]
    return found


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


def show_help(command: list[str], columns: int) -> str:
    """Return the help text of a command on a terminal of that width, which click uses up to 80."""
    found = find(command)
    with click.Context(found, info_name="pullcache", terminal_width=columns - 2) as context:
        return found.get_help(context)


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_every_command_has_options_for_the_file_and_the_store(command):
    help_text = run(*command, "--help").stdout
    if command not in (["config"], ["policy"], ["completion"]):
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


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_list_of_commands_has_each_summary_as_a_whole(columns):
    for group in ((), ("config",), ("policy",)):
        text = " ".join(show_help([*group], columns).split())
        for arguments in COMMANDS:
            if arguments[:-1] == [*group] and arguments:
                summary = find(arguments).get_short_help_str(1000)
                assert f"{arguments[-1]} {summary}" in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_into_60_columns_without_breaking_a_word(command):
    text = show_help(command, 500)
    words = {*text.split(), *text.replace("-", "- ").split()}
    lines = show_help(command, 60).splitlines()
    assert [line for line in lines if len(line) > 60] == []
    # A broken word would give two that are not among those of the wide text.
    assert {*" ".join(lines).split()} <= words


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_that_it_accepts(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("compose.yaml", "images.txt"):
        (tmp_path / name).touch()
    found = find(command)
    examples = re.findall(
        r"\bpullcache (.+?)(?:\)| [|>&]|$)",
        (found.help or "").partition("Examples:")[2],
        re.MULTILINE,
    )
    assert examples
    for line in examples:
        arguments = shlex.split(line)
        if command:
            assert arguments[: len(command)] == command
        names = [*itertools.takewhile(lambda one: [one] in COMMANDS or one in GROUPED, arguments)]
        with find(names).make_context("pullcache", arguments[len(names) :]):
            pass  # its files are closed


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
