"""The documentation of keys, commands and metrics against the program."""

import re
import textwrap
from collections.abc import Iterator

import click
import pytest

from proxy.cli import main
from proxy.config import iter_keys, load
from proxy.metrics import Metrics
from tests.support.markdown import DOCUMENTS, ROOT, items, read, sections, without_code
from tests.support.promql import labels_by_metric
from tests.test_metrics import Gauges

EXAMPLE = ROOT / "config" / "pullcache.toml"
KEYS = sections(read("docs/configuration.md"), 4)
COMMANDS = sections(read("docs/commands.md"), 3)
METRICS = {name: text for names, text in items(read("docs/metrics.md")) for name in names}
# The options of every command, which are described once.
COMMON_OPTIONS = {"-c", "--config", "--store"}


def iter_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from iter_commands(inner, f"{name} {part}")


def rendered_metrics() -> str:
    metrics = Metrics(["docker.io"], "1.0")
    metrics.register_gauges(Gauges())
    metrics.enable_fleet(lambda: True, lambda: 1)
    metrics.read_gauges()
    return metrics.render().decode()


def documented_options(section: str) -> set[str]:
    """Return the options that the list of a command's section describes, without their values."""
    return {name.split()[0] for names, _ in items(section) for name in names}


HELP_TEXTS = dict(re.findall(r"^# HELP (pullcache_\w+) (.*)$", rendered_metrics(), re.MULTILINE))
PROGRAM_COMMANDS = dict(iter_commands(main, "pullcache"))


@pytest.mark.parametrize("key", [*iter_keys()], ids=lambda key: key.path)
def test_the_configuration_page_describes_each_key_as_the_schema_does(key):
    default = "required" if key.default is None else f"`{key.default}`"
    words = " ".join(KEYS[f"`{key.path}`"].split())
    assert words.startswith(f"Default: {default} {key.description}")


def test_the_configuration_page_has_the_keys_of_the_schema_in_order_and_no_others():
    assert [*KEYS] == [f"`{key.path}`" for key in iter_keys()]


@pytest.mark.parametrize("name", HELP_TEXTS)
def test_the_metrics_page_describes_each_metric_with_its_labels_as_the_program_does(name):
    # The samples of a histogram have other names than the histogram.
    samples = labels_by_metric()
    labels = samples.get(name, samples.get(f"{name}_count", set()))
    (documented,) = [known for known in METRICS if known.partition("{")[0] == name]
    assert set(re.findall(r"\w+", documented.partition("{")[2])) == labels
    assert METRICS[documented] == HELP_TEXTS[name]


def test_the_documents_name_no_metric_that_does_not_exist():
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "CHANGELOG.md"]
    named = re.findall(r"`(pullcache_\w+)", "\n".join(texts))
    assert len(named) > len(HELP_TEXTS) > 20
    assert [name for name in named if name not in HELP_TEXTS] == []


@pytest.mark.parametrize("name", PROGRAM_COMMANDS)
def test_the_commands_page_describes_each_option_of_a_command_and_no_other(name):
    options = {
        option
        for parameter in PROGRAM_COMMANDS[name].params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    assert documented_options(COMMANDS[name]) == options - COMMON_OPTIONS


def test_the_commands_page_describes_no_command_that_does_not_exist():
    assert set(COMMANDS) == set(PROGRAM_COMMANDS)


def test_the_options_of_every_command_are_described_once():
    (paragraph,) = re.findall(
        r"\*\*Common options\.\*\*(.*?)\n\n", read("docs/commands.md"), re.DOTALL
    )
    assert set(re.findall(r"`(-[\w-]+)", paragraph)) == COMMON_OPTIONS


def command_lines(text: str) -> Iterator[str]:
    """Return each use of a command in code, what stands after the program's name."""
    code = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    code += re.findall(r"`([^`\n]+)`", without_code(text))
    for block in code:
        joined = block.replace("\\\n", " ")
        yield from re.findall(
            r"(?:^|[|&] |\.venv/bin/|-u pullcache )pullcache ([^|&#;\n]+)", joined, re.MULTILINE
        )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_in_a_document_has_a_command_and_options_that_exist(path):
    for line in command_lines(path.read_text(encoding="utf-8")):
        words = line.split()
        command: click.Command = main
        while words and isinstance(command, click.Group) and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if words and words[0] in ("COMMAND", "…", "--help", "--version"):
            continue
        assert not isinstance(command, click.Group), line
        known = {"--help"}.union(*(one.opts for one in command.params))
        used = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert used <= known, line


def test_command_lines_are_found():
    text = "```sh\nx | pullcache preload -f - \\\n  --pin\n```\n`pullcache images --sort unique`\n"
    assert [line.split() for line in command_lines(text)] == [
        ["preload", "-f", "-", "--pin"],
        ["images", "--sort", "unique"],
    ]


def test_the_commands_page_gives_the_exit_codes_as_the_help_does():
    codes = re.findall(r"^ +(\d) +(.+)$", main.help or "", re.MULTILINE)
    assert len(codes) == 5
    assert re.findall(r"^- (\d): (.+)$", read("docs/commands.md"), re.MULTILINE) == codes


@pytest.mark.parametrize("name", ["configuration", "preload", "migrating"])
def test_the_configuration_examples_can_be_loaded(name, tmp_path):
    blocks = re.findall(
        r"^( *)```toml\n(.*?)^\1```$", read(f"docs/{name}.md"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    for number, (_, block) in enumerate(blocks):
        file = tmp_path / f"{number}.toml"
        file.write_text(textwrap.dedent(block), encoding="utf-8")
        load(file, {}, {})


def test_the_example_configuration_holds_every_key_at_its_default():
    assert load(EXAMPLE, {}, {}) == load(None, {}, {}, is_root=True)
    text = EXAMPLE.read_text(encoding="utf-8")
    for key in iter_keys():
        if not key.path.startswith("manifests.tag_ttl"):
            # A table of an array is there, or it is not: it has no default.
            begin = (
                "# "
                if key.path.startswith(("preload.", "policy.", "rules.", "server.admin_tokens."))
                else ""
            )
            name = key.path.rpartition(".")[2]
            assert re.search(rf"^{begin}{name} = ", text, re.MULTILINE), key.path
