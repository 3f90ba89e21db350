"""What an image says of itself reaches no terminal as it is: rows M9 and M13 of the faults."""

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.content import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, digest_of
from tests.support.bundles import APP_FULL_NAME, LayoutBuilder, blob_path, import_bundle, make_tar
from tests.support.program import Program

# Clears the screen, names the window, answers as if typed, turns the direction of text, starts a line anew.
COMMANDS = "\x1b[2J\x1b]0;owned\x07\x1b[6n\u202e\x9b31m\r\x08"
EVIL = f"evil{COMMANDS}"


async def shown(program: Program, *arguments: str | Path) -> str:
    """Return what a command writes to a terminal, on stdout and stderr."""
    command = [sys.executable, "-m", "proxy", *map(str, arguments), "--store", str(program.root)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}

    def read() -> bytes:
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            content = bytearray()
            try:
                while piece := os.read(ours, 1 << 16):
                    content += piece
            except OSError:
                pass  # so Linux says that nobody holds the other end any more
            process.wait()
            return bytes(content)

    content = await asyncio.to_thread(read)
    os.close(ours)
    return content.decode()


def check(text: str) -> None:
    """What is left of `EVIL` is its escapes."""
    assert r"evil\x1b[2J" in text
    for command in ("\x1b[2J", "\x1b]0;", "\x07", "\x1b[6n", "\u202e", "\x9b", "\x08", "evil\r"):
        assert command not in text, repr(text)


def image(made: LayoutBuilder, **config: object) -> dict[str, object]:
    layer = made.add_blob(b"layer", OCI_LAYER)
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": made.add_blob({"os": "linux", "architecture": "amd64", **config}, OCI_CONFIG),
        "layers": [layer],
        "annotations": {EVIL: EVIL},
        "artifactType": EVIL,
    }
    return made.add_blob(document, OCI_MANIFEST)


@pytest.fixture
async def evil(program: Program) -> Program:
    made = LayoutBuilder()
    run = {"Labels": {EVIL: EVIL}, "Env": [EVIL], "Cmd": [EVIL], "User": EVIL, "WorkingDir": EVIL}
    history = [{"created_by": EVIL}]
    top = image(made, config=run, history=history, created=EVIL)
    made.list_image(top, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    return program


async def test_m09_a_config_s_history_and_labels_command_no_terminal(evil):
    for option in ((), ("--no-trunc",)):
        check(await shown(evil, "inspect", "app:1", *option))


async def test_m09_a_platform_that_is_none_commands_no_terminal(program):
    made = LayoutBuilder()
    top = image(made, architecture=EVIL)
    made.list_image(top, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    for command in (
        ["images"],
        ["inspect", "app:1"],
        ["check-offline", "app:1", "--platform", "all"],
    ):
        check(await shown(program, *command))
    check(await shown(program, "export", "app:1", "--platform", "linux/amd64", "-o", "/dev/null"))


@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
async def test_m09_what_a_bundle_calls_things_commands_no_terminal(program, tmp_path, json_option):
    made = LayoutBuilder()
    made.list_image(made.add_manifest(b"one"), name=f"{APP_FULL_NAME}:{EVIL}")
    made.list_image({**made.add_manifest(b"two"), "mediaType": EVIL}, name=f"{APP_FULL_NAME}:2")
    bundle = tmp_path / "bundle.tar"
    bundle.write_bytes(made.to_tar())
    text = await shown(program, "import", bundle, *json_option)
    if json_option:
        assert r"\u001b[2J" in text
        assert "\x1b[2J" not in text
    else:
        check(text)
    bundle.write_bytes(make_tar({f"../{EVIL}": b"x"}))
    check(await shown(program, "import", bundle))


async def test_m09_a_file_s_name_commands_no_terminal(program, tmp_path):
    file = tmp_path / EVIL
    check(await shown(program, "import", file))
    file.write_text("not: [a list")
    check(await shown(program, "check-offline", "-f", file))
    check(await shown(program, "import", file))


async def test_m13_a_config_that_is_too_large_is_not_looked_into(program):
    made = LayoutBuilder()
    top = image(made, history=[{"created_by": "x" * (5 << 20)}])
    made.list_image(top, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    text = await shown(program, "inspect", "app:1")
    assert len(text) < 3000
    assert "complete" in text
    assert digest_of(b"layer")[:19] in text


async def test_m13_a_config_that_is_no_config_is_not_shown(program):
    made = LayoutBuilder()
    top = image(made)
    described = json.loads(made.files[blob_path(str(top["digest"]))])["config"]
    bomb = b"[" * described["size"]
    document = json.loads(made.files.pop(blob_path(str(top["digest"]))))
    document["config"] = made.add_blob(bomb, OCI_CONFIG)
    made.list_image(made.add_blob(document, OCI_MANIFEST), name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    assert "complete" in await shown(program, "inspect", "app:1")
    assert "complete" in await shown(program, "images")
