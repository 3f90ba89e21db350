"""Completion in shells: of commands, and of the images that the running daemon has."""

import asyncio
import os
import subprocess
import sys

import pytest

from tests.support.commands import run


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_for_the_shell(shell):
    done = run("completion", shell)
    assert done.exit_code == 0
    assert f"_PULLCACHE_COMPLETE={shell}_complete" in done.stdout


async def complete(*words: str) -> list[str]:
    """Return what bash would offer for the last word."""
    environment = {
        **os.environ,
        "_PULLCACHE_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["pullcache", *words]),
        "COMP_CWORD": str(len(words)),
    }
    script = "from proxy.cli import main; main(prog_name='pullcache')"
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.split()]


async def test_images_of_the_running_daemon_are_offered(registry, program):
    for name in ("me/app", "me/other", "you/app"):
        await program.pull(registry.add_image(name))
    assert await complete("rm", "--store", str(program.root), "me/") == [
        "me/app:latest",
        "me/other:latest",
    ]
    assert await complete("inspect", "--store", str(program.root), "you") == ["you/app:latest"]


async def test_without_a_daemon_nothing_is_offered_and_nothing_is_made(tmp_path):
    assert await complete("rm", "--store", str(tmp_path / "none"), "me/") == []
    assert [*tmp_path.iterdir()] == []


async def test_commands_are_offered():
    assert "preload" in await complete("pre")
