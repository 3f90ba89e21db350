"""`pullcache images`, `inspect`, `rm`, `pin`, `unpin`, `check-offline`: what they print, and exit codes."""

import asyncio
import json
import os
import pty
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.fakes.content import digest_of
from tests.fakes.gallery import parts_of, push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OWN, pull_parts

HISTORY = [{"created_by": "ADD rootfs / # buildkit"}, {"created_by": "RUN make all # buildkit"}]


def run(*arguments: str, **kw: str) -> Result:
    return CliRunner().invoke(main, [*arguments], input=kw.get("typed"))


async def ask(program, *arguments: str, typed: str = "") -> Result:
    return await asyncio.to_thread(run, *arguments, "--store", str(program.root), typed=typed)


@pytest.fixture
async def app(registry, program):
    """`app:v1`, an index of which this machine's platform is here."""
    made = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE, history=HISTORY),
        FOREIGN: push_manifest(registry, APP, [b"other"], platform=FOREIGN),
    }
    index = push_index(registry, APP, "v1", made)
    await pull_parts(program, APP, "v1", made[NATIVE], *parts_of(registry, APP, made[NATIVE]))
    return made | {"index": index}


async def test_images_are_a_table_and_whole_where_no_terminal_is(registry, program, app):
    alone = push_manifest(registry, "me/alone", [b"alone"])
    await pull_parts(program, "me/alone", alone)
    done = await ask(program, "images")
    assert (done.exit_code, done.stderr) == (0, "")
    header, first, second = done.stdout.splitlines()
    assert header.split() == [
        "IMAGE",
        "PLATFORMS",
        "SIZE",
        "UNIQUE",
        "CACHED",
        "PULLED",
        "STATUS",
    ]
    assert first.split()[:3] == ["app:v1", NATIVE, "+1"]
    assert first.rstrip().endswith("complete")
    assert second.split()[0] == f"me/alone@{alone}"
    assert "partial, " in second


async def test_images_are_filtered_and_sorted(registry, program, app):
    push_manifest(registry, "me/large", [bytes(50_000)], tag="v1")
    await pull_parts(program, "me/large", "v1", digest_of(bytes(50_000)))
    by_size = json.loads((await ask(program, "images", "--sort", "size", "--json")).stdout)
    assert [image["name"] for image in by_size] == ["me/large:v1", "app:v1"]
    by_name = json.loads((await ask(program, "images", "v1", "--json")).stdout)
    assert [image["name"] for image in by_name] == ["app:v1", "me/large:v1"]
    assert json.loads((await ask(program, "images", "none", "--json")).stdout) == []


async def test_inspect_shows_layers_with_what_made_them(program, app):
    done = await ask(program, "inspect", "app:v1")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"digest     {app['index']}\n" in done.stdout
    assert f"platform   {NATIVE} (complete, " in done.stdout
    (layer,) = [line for line in done.stdout.splitlines() if digest_of(OWN) in line]
    assert layer.split()[3] == "yes"
    assert layer.rstrip().endswith("RUN make all")
    assert f"not in the store: {FOREIGN}\n" in done.stdout
    document = json.loads((await ask(program, "inspect", "app:v1", "--json")).stdout)
    assert document["digest"] == app["index"]


async def test_what_is_not_there_is_exit_code_1_and_one_line(program):
    for command in (["inspect"], ["rm"], ["rm", "--dry-run"]):
        done = await ask(program, *command, "app:none")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == (
            "pullcache: app:none is not in the store; pullcache images lists stored images\n"
        )


async def test_rm_says_what_it_frees_and_a_dry_run_only_says_it(program, app):
    (image,) = json.loads((await ask(program, "images", "--json")).stdout)
    done = await ask(program, "rm", "--dry-run", "app:v1")
    assert "would remove app:v1\n" in done.stdout
    assert "in 5 blobs would be free\n" in done.stdout
    assert len(program.stored()) == 5
    done = await ask(program, "rm", "app:v1", "--json")
    assert json.loads(done.stdout) == {"images": ["app:v1"], "blobs": 5, "bytes": image["unique"]}
    assert program.stored() == set()


async def test_a_pinned_image_is_kept_until_it_is_unpinned(program, app):
    done = await ask(program, "pin", "app:v1", "redis:7")
    assert (done.exit_code, done.stdout) == (0, "pinned app:v1\npinned redis:7\n")
    shown = (await ask(program, "images")).stdout
    assert "complete, pinned" in shown
    assert "absent, pinned" in shown
    assert "pinned     " in (await ask(program, "status")).stdout
    done = await ask(program, "rm", "app:v1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "app:v1 is pinned; unpin it first, or use --force" in done.stderr
    done = await ask(program, "unpin", "app:v1", "app:v2")
    assert (done.stdout, done.stderr) == ("unpinned app:v1\n", "1 of 2 were not pinned\n")
    assert (await ask(program, "rm", "app:v1")).exit_code == 0


async def test_status_says_when_pins_leave_no_room(registry, make_program):
    program = await make_program(store={"max_size": "8MB"})
    layer = bytes(7_250_000)
    push_manifest(registry, APP, [layer], tag="v1")
    await pull_parts(program, APP, "v1")
    await ask(program, "pin", "app:v1")
    assert "no room is left" not in (await ask(program, "status")).stdout
    await program.blob(digest_of(layer))
    await program.settled()
    assert "no room is left for the rest" in (await ask(program, "status")).stdout


class TestCheckOffline:
    """Exit code 0 only if everything could be pulled with the network unplugged."""

    async def test_what_is_complete_is_exit_code_0(self, program, app):
        done = await ask(program, "check-offline", "app:v1")
        assert (done.exit_code, done.stderr) == (0, "all could be pulled offline\n")
        assert done.stdout.splitlines()[1].split() == ["app:v1", NATIVE, "complete"]

    async def test_a_list_is_checked_line_by_line(self, registry, program, app):
        (program.root / "blobs/sha256" / digest_of(OWN).removeprefix("sha256:")).unlink()
        lines = f"app:v1\napp:v1 platform={FOREIGN}\nredis\nBad Name\n"
        done = await ask(program, "check-offline", "-f", "-", typed=lines)
        assert done.exit_code == 1
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        assert [row[:3] for row in rows] == [
            ["app:v1", NATIVE, "partial"],
            ["app:v1", FOREIGN, "absent"],
            ["redis:latest", NATIVE, "absent"],
        ]
        assert rows[0][3] == digest_of(OWN)[: len("sha256:") + 12]
        assert "3 of 3 could not be pulled offline; " in done.stderr
        assert ":4: " in done.stderr

    async def test_a_line_that_cannot_be_read_is_a_no_too(self, program, app):
        done = await ask(program, "check-offline", "-f", "-", typed="app:v1\nBad Name\n")
        assert done.exit_code == 1
        assert "complete" in done.stdout

    async def test_a_platform_that_is_given_counts_more_than_the_list_s(self, program, app):
        lines = f"app:v1 platform={FOREIGN}"
        done = await ask(
            program, "check-offline", "-f", "-", "--platform", NATIVE, "--json", typed=lines
        )
        (check,) = json.loads(done.stdout)
        assert (check["platform"], check["state"], done.exit_code) == (NATIVE, "complete", 0)

    def test_nothing_to_check_is_a_usage_error(self, tmp_path):
        done = run("check-offline", "--store", str(tmp_path / "store"))
        assert done.exit_code == 2
        assert "name images, or a list of them with -f" in done.stderr


async def test_all_of_it_works_without_a_daemon(program, app, monkeypatch):
    await program.stop()
    assert "complete" in (await ask(program, "images")).stdout
    assert (await ask(program, "check-offline", "app:v1")).exit_code == 0
    assert (await ask(program, "pin", "app:v1")).exit_code == 0
    assert "pinned     yes" in (await ask(program, "inspect", "app:v1")).stdout
    assert (await ask(program, "rm", "--force", "app:v1")).exit_code == 0
    await program.start()
    assert program.stored() == set()


async def test_a_terminal_gets_short_digests(program, app):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "inspect", "app:v1", "--store", str(program.root)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    for option, is_short in ((), True), (("--no-trunc",), False):
        await asyncio.to_thread(
            subprocess.run, [*command, *option], stdout=theirs, check=True, env=environment
        )
        shown = os.read(ours, 1 << 16).decode()
        assert digest_of(OWN)[: len("sha256:") + 12] in shown
        assert (digest_of(OWN) not in shown) is is_short
    os.close(theirs)
    os.close(ours)
