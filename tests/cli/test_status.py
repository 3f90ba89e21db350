"""`pullcache status` and `pullcache offline`: what they print, and their exit codes."""

import asyncio
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from proxy import __version__
from proxy.cli import main
from proxy.cli.display.text import format_duration


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


async def ask(program, *arguments: str) -> Result:
    return await asyncio.to_thread(run, *arguments, "--store", str(program.root))


async def test_status_is_one_screen(registry, program):
    image = registry.add_image(layers=[b"x" * 100_000])
    await program.pull(image)
    await program.settled()
    await program.blob(image.layers[0])
    done = await ask(program, "status")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"state      serving\nversion    {__version__}\n" in done.stdout
    assert f"listening  {program.addresses[0]}\n" in done.stdout
    assert "of at most 1 GB in 3 blobs\n" in done.stdout
    assert "downloads  0 running\n" in done.stdout
    assert "saved\n" in done.stdout
    assert registry.url in done.stdout
    assert "\x1b" not in done.stdout


async def test_status_names_where_the_admin_api_is(make_program):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    done = await ask(program, "status")
    assert f"admin      {program.admin_addresses[0]}\n" in done.stdout


async def test_status_as_json_is_the_api_s_document(program):
    done = await ask(program, "status", "--json")
    document = json.loads(done.stdout)
    assert (document["state"], document["addresses"]) == ("serving", program.addresses)


def test_status_without_a_daemon_shows_the_store(tmp_path):
    done = run("status", "--store", str(tmp_path / "store"))
    assert (done.exit_code, done.stderr) == (0, "")
    assert "no daemon runs on this store\n" in done.stdout
    assert "0 B of at most 50 GB in 0 blobs\n" in done.stdout


async def test_the_probe_says_by_its_exit_code_whether_the_daemon_serves(program):
    done = await ask(program, "status", "--probe")
    assert (done.exit_code, done.output) == (0, "")
    await program.stop()
    done = await ask(program, "status", "--probe")
    assert (done.exit_code, done.output) == (1, "")


def test_the_probe_starts_nothing(tmp_path):
    done = run("status", "--probe", "--store", str(tmp_path / "store"))
    assert (done.exit_code, done.output) == (1, "")
    assert not (tmp_path / "store").exists()


def test_the_probe_loads_little(tmp_path):
    script = (
        "import sys\nfrom proxy.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'aiohttp', 'rich', 'uvloop', 'structlog'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", script, "status", "--probe", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (1, "[]\n")


async def test_offline_is_switched_on_and_off(registry, program):
    done = await ask(program, "offline", "on")
    assert done.exit_code == 0
    assert done.stdout.endswith("offline is on\n")
    assert "state      offline\n" in (await ask(program, "status")).stdout
    assert (await program.manifest("me/app")).status == 503
    assert registry.count("/manifests/") == 0
    await ask(program, "offline", "off")
    assert (await program.manifest("me/app")).status == 404


def test_offline_needs_a_daemon_to_switch(tmp_path):
    done = run("offline", "on", "--store", str(tmp_path))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pullcache: no daemon answers on {tmp_path}/admin.sock\n"


def test_offline_is_on_or_off(tmp_path):
    assert run("offline", "maybe", "--store", str(tmp_path)).exit_code == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3_661, "1 h 1 min"),
        (86_400, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_duration_has_its_two_greatest_units(seconds, text):
    assert format_duration(seconds) == text
