"""Text from images and bundles never controls the terminal: rows M9 and M13 of the faults."""

import json
from pathlib import Path

import pytest

from tests.fakes.content import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, digest_of
from tests.support.bundles import APP_FULL_NAME, LayoutBuilder, blob_path, import_bundle, make_tar
from tests.support.commands import run_on_terminal
from tests.support.program import Program

# Sequences that clear the screen, set the window title, make the terminal type an answer, reverse
# the text direction, set a colour, and overwrite the line.
SEQUENCES = "\x1b[2J\x1b]0;owned\x07\x1b[6n\u202e\x9b31m\r\x08"
EVIL = f"evil{SEQUENCES}"


def check(text: str) -> None:
    """Fail unless the text contains `EVIL` in an escaped form only."""
    assert r"evil\x1b[2J" in text
    for sequence in ("\x1b[2J", "\x1b]0;", "\x07", "\x1b[6n", "\u202e", "\x9b", "\x08", "evil\r"):
        assert sequence not in text, repr(text)


async def shown_by(program: Program, *arguments: str | Path) -> str:
    return await run_on_terminal(program, *arguments, columns=100, exit_code=None)


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


async def test_m09_history_and_labels_of_a_config_are_escaped(evil):
    for option in ((), ("--no-trunc",)):
        check(await shown_by(evil, "inspect", "app:1", *option))


async def test_m09_a_malformed_platform_is_escaped(program):
    made = LayoutBuilder()
    top = image(made, architecture=EVIL)
    made.list_image(top, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    for command in (
        ["images"],
        ["inspect", "app:1"],
        ["check-offline", "app:1", "--platform", "all"],
    ):
        check(await shown_by(program, *command))
    check(
        await shown_by(program, "export", "app:1", "--platform", "linux/amd64", "-o", "/dev/null")
    )


@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
async def test_m09_names_in_a_bundle_are_escaped(program, tmp_path, json_option):
    made = LayoutBuilder()
    made.list_image(made.add_manifest(b"one"), name=f"{APP_FULL_NAME}:{EVIL}")
    made.list_image({**made.add_manifest(b"two"), "mediaType": EVIL}, name=f"{APP_FULL_NAME}:2")
    bundle = tmp_path / "bundle.tar"
    bundle.write_bytes(made.to_tar())
    text = await shown_by(program, "import", bundle, *json_option)
    if json_option:
        assert r"\u001b[2J" in text
        assert "\x1b[2J" not in text
    else:
        check(text)
    bundle.write_bytes(make_tar({f"../{EVIL}": b"x"}))
    check(await shown_by(program, "import", bundle))


async def test_m09_a_file_name_is_escaped(program, tmp_path):
    file = tmp_path / EVIL
    check(await shown_by(program, "import", file))
    file.write_text("not: [a list")
    check(await shown_by(program, "check-offline", "-f", file))
    check(await shown_by(program, "import", file))


async def test_m13_a_config_that_is_too_large_is_not_parsed(program):
    made = LayoutBuilder()
    top = image(made, history=[{"created_by": "x" * (5 << 20)}])
    made.list_image(top, name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    text = await shown_by(program, "inspect", "app:1")
    assert len(text) < 3000
    assert "complete" in text
    assert digest_of(b"layer")[:19] in text


async def test_m13_a_malformed_config_is_not_shown(program):
    made = LayoutBuilder()
    top = image(made)
    described = json.loads(made.files[blob_path(str(top["digest"]))])["config"]
    bomb = b"[" * described["size"]
    document = json.loads(made.files.pop(blob_path(str(top["digest"]))))
    document["config"] = made.add_blob(bomb, OCI_CONFIG)
    made.list_image(made.add_blob(document, OCI_MANIFEST), name=f"{APP_FULL_NAME}:1")
    await import_bundle(program, made.to_tar())
    assert "complete" in await shown_by(program, "inspect", "app:1")
    assert "complete" in await shown_by(program, "images")
