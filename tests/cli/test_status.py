"""`pullcache status` and `pullcache offline`: output and exit codes."""

import asyncio
import json
import os
import pwd
import re
import subprocess
import sys
import time

from proxy import __version__
from proxy.storage.blobs import BlobStore
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.support.admin_api import APP, pull_parts
from tests.support.commands import run, run_on, run_on_terminal


async def test_status_fits_on_one_screen(registry, program):
    image = registry.add_image(layers=[b"x" * 100_000])
    await program.pull(image)
    await program.wait_for_downloads()
    await program.blob(image.layers[0])
    done = await run_on(program, "status")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"state      serving\nversion    {__version__}\n" in done.stdout
    assert f"listening  {program.addresses[0]}\n" in done.stdout
    assert " of 1 GB in 3 blobs\n" in done.stdout
    assert "downloads  0 running\n" in done.stdout
    assert re.search(r"^hit        \d requests?, \d+ kB$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +today +7 days +30 days$", done.stdout, re.MULTILINE)
    assert re.search(r"^pulls +1 +1 +1$", done.stdout, re.MULTILINE)
    assert re.search(r"^saved( +100 kB){3}$", done.stdout, re.MULTILINE)
    assert registry.url in done.stdout
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) <= 24


async def test_the_longest_label_of_status_is_followed_by_a_space(registry, make_program):
    program = await make_program(manifests={"ttl": "0s"})
    image = registry.add_image()
    for _ in range(2):
        await program.manifest(image)
    done = await run_on(program, "status")
    assert re.search(r"^revalidated 1 request, \d+ B$", done.stdout, re.MULTILINE)


async def test_status_shows_the_address_of_the_admin_api(make_program):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    done = await run_on(program, "status")
    assert f"admin      {program.admin_addresses[0]}\n" in done.stdout


async def test_status_says_what_an_upstream_was_found_unable_to_do(registry, make_program):
    registry.referrers = registry.cdn = False
    registry.front.accept_ranges = False
    registry.fail("^HEAD ", Fault(status=405), times=None)
    image = registry.add_image(layers=[b"x" * 3_000_000])
    registry.add_image("me/other")
    program = await make_program(manifests={"ttl": "0s"}, fetch={"parallel_above": "1MB"})
    for repository in (APP, "me/other"):
        for _ in range(2):
            await program.manifest(repository)
        await program.blob(digest_of(b"unknown"), repository, method="HEAD")
        await program.ask(f"/v2/{repository}/referrers/{image.digest}")
    await program.blob(image.config, method="HEAD")
    await program.blob(image.layers[0])
    document = json.loads((await run_on(program, "status", "--json")).stdout)
    missing = document["upstreams"][0]["missing_features"]
    assert {one["feature"]: one["repositories"] for one in missing} == {
        "manifest_head": 2,
        "blob_head": 1,
        "ranges": 1,
        "referrers": 2,
    }
    text = (await run_on(program, "status")).stdout
    assert "docker.io: no HEAD of manifests in 2 repositories; tried again after " in text
    assert "docker.io: no ranges of blobs in 1 repository; tried again after " in text
    program.clock.advance(3601)
    document = json.loads((await run_on(program, "status", "--json")).stdout)
    assert document["upstreams"][0]["missing_features"] == []


async def test_status_as_json_is_the_document_of_the_admin_api(program):
    done = await run_on(program, "status", "--json")
    document = json.loads(done.stdout)
    assert (document["state"], document["addresses"]) == ("serving", program.addresses)


async def test_status_warns_when_pins_take_nearly_all_space(registry, make_program):
    program = await make_program(store={"max_size": "10MB"})
    layer = bytes(9_100_000)
    push_manifest(registry, APP, [layer], tag="v1")
    await pull_parts(program, APP, "v1")
    await run_on(program, "pin", "app:v1")
    assert "too little space left" not in (await run_on(program, "status")).stdout
    await program.blob(digest_of(layer))
    await program.wait_for_downloads()
    text = (await run_on(program, "status")).stdout
    assert re.search(
        r"^pinned     9\.\d+ MB; too little space left to store other", text, re.MULTILINE
    )


async def test_the_top_shows_what_is_pulled_most(registry, program):
    for name, times in (("library/rare", 1), ("me/often", 3)):
        image = registry.add_image(name, layers=[b"x" * 50_000])
        for _ in range(times):
            await program.manifest(image, "latest")
    images = await run_on(program, "top")
    assert images.stdout.splitlines()[0].split() == ["IMAGE", "PULLS", "HITS", "SENT"]
    assert [line.split()[:3] for line in images.stdout.splitlines()[1:]] == [
        ["me/often:latest", "3", "67%"],
        ["rare:latest", "1", "0%"],
    ]
    repositories = (await run_on(program, "top", "repositories")).stdout.splitlines()
    assert repositories[0].split() == ["REPOSITORY", "PULLS", "HITS", "SENT", "FETCHED"]
    clients = json.loads((await run_on(program, "top", "clients", "--json")).stdout)
    assert [(one["name"], one["pulls"]) for one in clients] == [("127.0.0.1", 4)]
    assert (await run_on(program, "top", "flavours")).exit_code == 2


async def test_status_without_a_daemon_still_shows_what_was_saved(registry, program):
    program.clock.advance(time.time() - program.clock())  # the command has the real clock
    await program.pull(registry.add_image(layers=[b"x" * 50_000]))
    await program.stop()
    done = await asyncio.to_thread(run, "status", "--store", program.root)
    assert "state      no daemon is running\n" in done.stdout
    assert re.search(r"^pulls +\d +1 +1$", done.stdout, re.MULTILINE)


def test_status_without_a_daemon_shows_the_store_and_exits_1(tmp_path):
    BlobStore(tmp_path / "store").close()
    done = run("status", "--store", tmp_path / "store")
    assert (done.exit_code, done.stderr) == (1, "")
    assert "state      no daemon is running\n" in done.stdout
    assert "used       0 B of 50 GB in 0 blobs\n" in done.stdout


async def test_watch_shows_the_state_until_the_daemon_stops(program):
    command = [sys.executable, "-m", "proxy", "status", "--watch", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--store", str(program.root)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    states = [json.loads(await process.stdout.readline())["state"] for _ in range(2)]
    assert states == ["serving", "serving"]
    await program.stop()
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"no daemon is listening" in errors or b"daemon stopped" in errors


def test_status_without_a_store_says_so_and_makes_none(tmp_path):
    done = run("status", "--store", tmp_path / "typo")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"no daemon is running: there is no store at {tmp_path}/typo" in done.stderr
    assert not (tmp_path / "typo").exists()


async def test_the_probe_exits_0_while_the_daemon_is_ready_else_1(program):
    done = await run_on(program, "status", "--probe")
    assert (done.exit_code, done.output) == (0, "")
    await program.stop()
    done = await run_on(program, "status", "--probe")
    assert (done.exit_code, done.output) == (1, "")


def test_the_probe_does_not_create_a_store(tmp_path):
    done = run("status", "--probe", "--store", tmp_path / "store")
    assert (done.exit_code, done.output) == (1, "")
    assert not (tmp_path / "store").exists()


def test_the_probe_imports_little(tmp_path):
    script = (
        "import sys\nfrom proxy.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'aiohttp', 'rich', 'uvloop', 'structlog'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", script, "status", "--probe", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (1, "[]\n")


async def test_the_daemon_is_switched_offline_and_online(registry, program):
    done = await run_on(program, "offline", "on")
    assert (done.exit_code, done.stdout) == (0, "offline mode is on\n")
    assert "state      offline\n" in (await run_on(program, "status")).stdout
    assert (await program.manifest("me/app")).status == 503
    assert registry.count("/manifests/") == 0
    await run_on(program, "offline", "off")
    assert (await program.manifest("me/app")).status == 404


def test_offline_needs_a_running_daemon(tmp_path):
    done = run("offline", "on", "--store", tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pullcache: no daemon is listening on {tmp_path}/admin.sock\n"


def test_offline_accepts_on_and_off_only(tmp_path):
    assert run("offline", "maybe", "--store", tmp_path).exit_code == 2


async def test_status_shows_that_the_credentials_were_rejected(registry, make_program):
    registry.tokens.users["me"] = "right"
    upstream = {"url": registry.url, "username": "me", "password": "s3cret-typo"}
    program = await make_program(upstreams={"docker.io": upstream})
    assert (await program.manifest(registry.add_image())).status == 404
    text = (await run_on(program, "status")).stdout
    assert " rejected the configured credentials" in text
    registry.tokens.users["me"] = "s3cret-typo"
    assert (await program.manifest(registry.add_image("me/other"))).status == 200
    assert "rejected" not in (await run_on(program, "status")).stdout


async def test_without_a_daemon_no_upstream_was_asked(program):
    await program.stop()
    done = await run_on(program, "status")
    assert done.exit_code == 1
    assert re.search(r"docker\.io +not asked ", done.stdout)


async def test_events_tell_who_removed_an_image(registry, program):
    await program.pull(registry.add_image(layers=[b"x" * 50_000]))
    program.clock.advance(time.time() - program.clock())
    await run_on(program, "rm", "app")
    done = await run_on(program, "events", "--image", "app:latest")
    header, line = done.stdout.splitlines()
    assert header.split() == ["TIME", "ACTION", "BY", "IMAGES", "OUTCOME"]
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert re.search(rf" remove +{user} \(pid {os.getpid()}\) +app:latest +freed \d+", line)
    assert json.loads((await run_on(program, "events", "--json")).stdout)[0]["action"] == "remove"


async def test_an_empty_trail_says_so(program):
    done = await run_on(program, "events")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no events in the last 30d\n")


async def test_events_fit_a_narrow_terminal(registry, program):
    await program.pull(registry.add_image(layers=[b"x" * 50_000]))
    program.clock.advance(time.time() - program.clock())
    await run_on(program, "pin", "app")
    await run_on(program, "rm", "app")
    await run_on(program, "rm", "app", "--force")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", await run_on_terminal(program, "events", columns=60))
    user = pwd.getpwuid(os.geteuid()).pw_name
    lines = [line.split() for line in shown.splitlines()[1:]]
    assert [line[2:6] for line in lines if line] == [
        ["remove", user, "app:latest", "freed"],
        ["remove", user, "app:latest", "failed:"],
        ["pin", user, "app:latest", "done"],
    ]
    assert all(len(line) <= 60 for line in shown.splitlines())


async def test_events_say_on_a_narrow_terminal_which_image_is_gone(registry, program):
    program.clock.advance(time.time() - program.clock())
    await program.pull(registry.add_image("me/app-with-a-name"))
    registry.fail("/manifests/latest", Fault(status=404), times=None)
    await run_on(program, "refresh", "me/app-with-a-name")
    await run_on(program, "preload", "me/app-with-a-name", "me/other")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", await run_on_terminal(program, "events", columns=60))
    preloaded, refreshed = shown.splitlines()[1:]
    assert "  failed: 2" in preloaded  # as much as the name of the user leaves room for
    assert refreshed.rstrip().endswith("  1 gone")
    assert all(len(line) <= 60 for line in shown.splitlines())
