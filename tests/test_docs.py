"""The documentation against the program."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from proxy.cli import main
from proxy.config import iter_keys, load
from proxy.metrics import Metrics
from tests.test_metrics import Gauges

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "config" / "pullcache.toml"


def iter_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from iter_commands(inner, f"{name} {part}")


def rendered() -> str:
    metrics = Metrics(["docker.io"], "1.0")
    metrics.register_gauges(Gauges())
    return metrics.render().decode()


def metric_rows() -> Iterator[str]:
    for name, text in re.findall(r"^# HELP (pullcache_\w+) (.*)$", rendered(), re.MULTILINE):
        yield rf"\| `{name}(\{{[a-z,]+\}})?` \| {re.escape(text)} \|"


@pytest.mark.parametrize("key", [*iter_keys()], ids=lambda key: key.path)
def test_the_readme_describes_each_key_as_the_schema_does(key):
    default = "required" if key.default is None else f"`{key.default}`"
    assert f"| `{key.path}` | {default} | {key.description} |\n" in README


def test_the_readme_describes_no_key_that_does_not_exist():
    (table,) = re.findall(r"^\| key .*\n\|-.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert re.findall(r"^\| `(\S+)`", table, re.MULTILINE) == [key.path for key in iter_keys()]


@pytest.mark.parametrize("row", [*metric_rows()])
def test_the_readme_describes_each_metric_as_the_program_does(row):
    assert re.search(f"^{row}$", README, re.MULTILINE)


def test_the_readme_names_no_metric_that_does_not_exist():
    named = re.findall(r"`(pullcache_\w+)", README)
    assert named
    assert [name for name in named if f"# TYPE {name} " not in rendered()] == []


@pytest.mark.parametrize(("name", "command"), [*iter_commands(main, "pullcache")])
def test_the_readme_names_each_command_and_its_options(name, command):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "path":
            assert parameter.opts[-1] in row + "--store DIR"


def test_the_readme_says_what_the_exit_codes_mean():
    help_text = " ".join((main.help or "").split())
    for code, meaning in enumerate(("done", "failed", "", "bad bytes found", "partly done")):
        assert f"{code} {meaning}" in help_text
        assert f"{code} {meaning}" in README


def test_the_example_configuration_holds_every_key_at_its_default():
    assert load(EXAMPLE, {}, {}) == load(None, {}, {}, is_root=True)
    text = EXAMPLE.read_text(encoding="utf-8")
    for key in iter_keys():
        if not key.path.startswith("manifests.tag_ttl"):
            # A table of an array is there, or it is not: it has no default.
            begin = "# " if key.path.startswith("preload.") else ""
            name = key.path.rpartition(".")[2]
            assert re.search(rf"^{begin}{name} = ", text, re.MULTILINE), key.path
