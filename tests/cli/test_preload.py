"""`pullcache preload`: what it prints, exit codes, lock files, and how it looks at a terminal."""

import asyncio
import json
import logging
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
import structlog

from proxy.cli.display import preload_progress
from proxy.cli.display.preload_tracker import ProgressTracker
from tests.cli.test_images import ask, run
from tests.fakes.content import digest_of
from tests.fakes.gallery import push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OWN, check_images

LAYER = bytes(range(256)) * 4000


@pytest.fixture(autouse=True)
def _quiet():
    """Keep the daemon's log off the command's stdout: here both are one process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


@pytest.fixture
def app(registry):
    """`app:v1`, an index for this machine's platform and another."""
    made = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [LAYER], platform=FOREIGN),
    }
    return made | {"index": push_index(registry, APP, "v1", made)}


async def test_a_line_an_image_goes_to_stdout_and_the_rest_to_stderr(program, app):
    done = await ask(program, "preload", "app:v1")
    assert done.exit_code == 0
    assert re.fullmatch(r"app:v1: Pull complete, [\d.]+ kB of [\d.]+ kB fetched\n", done.stdout)
    assert re.fullmatch(
        r"1 image of [\d.]+ kB, [\d.]+ kB to be fetched\n"
        r"1 image, 1 fetched \([\d.]+ kB\), 0 up to date, 0 failed\n",
        done.stderr,
    )
    done = await ask(program, "preload", "app:v1")
    assert (done.exit_code, done.stdout) == (0, "app:v1: Image is up to date\n")


async def test_lists_of_any_kind_are_read_and_bad_entries_named_by_line(program, app, tmp_path):
    compose = tmp_path / "compose.yaml"
    compose.write_text("services:\n  web: {image: app:v1}\n  bad: {image: Bad Name}\n")
    plain = f"docker.io/library/app:v1 platform={FOREIGN}\napp:none\n"
    done = await ask(program, "preload", "-f", str(compose), "-f", "-", typed=plain)
    assert done.exit_code == 4
    assert f"{compose}:3: 'Bad Name' is not" in done.stderr
    assert "app:v1: Pull complete" in done.stdout
    assert "app:none: failed: " in done.stdout
    states = await check_images(program, "app:v1", {"image": "app:v1", "platforms": [FOREIGN]})
    assert [check["state"] for check in states] == ["complete", "complete"]


async def test_if_nothing_can_be_had_the_exit_code_is_1(program, app, tmp_path):
    assert (await ask(program, "preload", "app:none")).exit_code == 1
    assert (await ask(program, "preload", "-f", "-", typed="Bad Name\n")).exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("app:v1", "--platform", "amd64"),
        ("app:v1", "--platform", "linux/amd64", "--all-platforms"),
        ("app:v1", "-j", "0"),
        ("-f", "/nowhere/at/all"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, arguments):
    assert run("preload", "--store", str(tmp_path / "store"), *arguments).exit_code == 2


async def test_all_platforms_pin_and_dry_run_are_passed_on(program, app):
    done = await ask(program, "preload", "app:v1", "--dry-run", "-j", "1")
    assert (done.exit_code, re.sub(r"[\d.]+ kB", "", done.stdout)) == (
        0,
        "app:v1: would be fetched, \n",
    )
    assert digest_of(OWN) not in program.stored()
    done = await ask(program, "preload", "app:v1", "--all-platforms", "--pin")
    assert digest_of(LAYER) in program.stored()
    (image,) = json.loads((await ask(program, "images", "--json")).stdout)
    assert image["pinned"]


async def test_json_is_the_events(program, app):
    done = await ask(program, "preload", "app:v1", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["resolving", "totals"]
    assert done.stderr == ""


class TestLock:
    """A lock file repeats a preload exactly."""

    async def test_it_is_read_as_a_list_and_gives_the_same_again(
        self, registry, make_program, app, tmp_path
    ):
        program = await make_program()
        push_manifest(registry, "me/plain", [b"plain"], tag="v1", platform=FOREIGN)
        lock = tmp_path / "images.lock"
        lock.write_text("what was here before")
        wanted = ["me/plain:v1", "app:v1"]
        done = await ask(program, "preload", *wanted, "--platform", FOREIGN, "--lock", str(lock))
        assert done.exit_code == 0
        document = json.loads(lock.read_text())
        assert [entry["image"] for entry in document["images"]] == [
            "docker.io/library/app:v1",
            "docker.io/me/plain:v1",
        ]
        assert document["images"][0]["digest"] == app["index"]
        assert document["images"][0]["platforms"] == [FOREIGN]
        again = tmp_path / "again.lock"
        await ask(
            program, "preload", *reversed(wanted), "--platform", FOREIGN, "--lock", str(again)
        )
        assert again.read_bytes() == lock.read_bytes()
        assert not list(tmp_path.glob(".*")), "something half written"
        # The tag moves; what the lock names does not.
        newer = push_manifest(registry, APP, [b"newer"], platform=FOREIGN)
        push_index(registry, APP, "v1", {FOREIGN: newer})
        other = await make_program(tmp_path / "other")
        done = await ask(other, "preload", "-f", str(lock))
        assert done.exit_code == 0
        assert digest_of(LAYER) in other.stored()
        assert digest_of(b"newer") not in other.stored()
        assert digest_of(OWN) not in other.stored()
        assert (await ask(other, "check-offline", "-f", str(lock))).exit_code == 0

    async def test_what_failed_is_not_in_it(self, program, app, tmp_path):
        lock = tmp_path / "images.lock"
        done = await ask(program, "preload", "app:v1", "app:none", "--lock", str(lock))
        assert done.exit_code == 4
        (entry,) = json.loads(lock.read_text())["images"]
        assert entry["image"] == "docker.io/library/app:v1"

    async def test_everything_stays_everything(self, program, app, tmp_path):
        lock = tmp_path / "images.lock"
        await ask(program, "preload", "app:v1", "--all-platforms", "--lock", str(lock))
        assert json.loads(lock.read_text())["images"][0]["platforms"] == ["all"]
        done = await ask(program, "check-offline", "-f", str(lock))
        assert (done.exit_code, len(done.stdout.splitlines())) == (0, 3)


async def test_without_a_daemon_it_is_one_itself_and_what_the_configuration_orders_is_not_run(
    registry, program, app, tmp_path, monkeypatch
):
    await program.stop()
    file = tmp_path / "pullcache.toml"
    file.write_text(
        f'store = {{path = "{program.root}", min_free = "0B"}}\n'
        f'upstreams."docker.io".url = "{registry.url}"\n'
        '[[preload]]\nimages = ["me/scheduled:v1"]\n'
    )
    done = await asyncio.to_thread(run, "preload", "-c", str(file), "app:v1")
    assert (done.exit_code, registry.count("me/scheduled")) == (0, 0)
    await program.start()
    assert (await check_images(program, "app:v1"))[0]["state"] == "complete"


async def test_a_terminal_shows_bars_in_docker_s_words(registry, program, app):
    push_manifest(registry, APP, [LAYER], tag="slow", platform=NATIVE)
    registry.throttle(700_000)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "preload", "app:slow", "app:none"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = await asyncio.to_thread(
        subprocess.Popen,
        [*command, "--store", str(program.root)],
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = await asyncio.to_thread(_read_all, ours)
    assert await asyncio.to_thread(process.wait) == 4
    layer = digest_of(LAYER).partition(":")[2][:12]
    assert re.search(rf"{layer}: Downloading +\[=*>? *\] [\d.]+ kB/1.02 MB", shown)
    assert re.search(r"of 2 images, [\d.]+ kB of 1.02 MB, [\d.]+ kB/s, \d s left", shown)
    assert "app:slow: Pull complete, 1.02 MB of 1.02 MB fetched" in shown
    assert "app:none: failed: " in shown
    assert "2 images, 1 fetched (1.02 MB), 0 up to date, 1 failed" in shown


def _read_all(terminal: int) -> str:
    read = bytearray()
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            piece = b""
        if not piece:
            os.close(terminal)
            return read.decode()
        read += piece


class TestWhatIsSaidMeanwhile:
    """The meter and the views, told of events."""

    now = 0.0

    def meter(self, *events: dict[str, Any]) -> ProgressTracker:
        meter = ProgressTracker(lambda: self.now)
        for event in events:
            self.now += 1
            meter.record(event)
        return meter

    def resolved(self, image: str, *layers: tuple[str, int, bool]) -> list[dict[str, Any]]:
        named = [
            {"digest": f"sha256:{name * 64}", "size": size, "exists": exists}
            for name, size, exists in layers
        ]
        return [
            {"event": "resolving", "image": image},
            {"event": "resolved", "image": image, "layers": named},
        ]

    def layer(self, name: str, state: str, offset: int, resumed: int = 0) -> dict[str, Any]:
        digest = f"sha256:{name * 64}"
        return {
            "event": "layer",
            "digest": digest,
            "state": state,
            "offset": offset,
            "size": 0,
            "resumed": resumed,
        }

    def test_what_was_here_already_makes_no_rate(self):
        meter = self.meter(
            *self.resolved("a", ("a", 1000, False), ("b", 500, True)),
            self.layer("a", "downloading", 600, resumed=500),
            self.layer("b", "exists", 500),
            self.layer("c", "complete", 7000),
        )
        assert meter.summary() == "0 of 1 images, 600 B of 1 kB, 33 B/s, 12 s left"

    def test_a_screen_that_is_too_small_shows_what_moves(self):
        layers = [(name, 1000, False) for name in "abcdef"]
        meter = self.meter(
            *self.resolved("a", *layers),
            self.layer("a", "complete", 1000),
            self.layer("e", "downloading", 500),
            {"event": "waiting", "upstream": "docker.io", "reason": "why", "until": 0.0},
        )
        lines = preload_progress._render_lines(meter, 60, 5)
        assert [line.partition(" ")[2] for line in lines[:2]] == [
            "Pulling fs layer",
            "Downloading        500 B/1 kB",
        ]
        assert re.fullmatch(r"docker.io: waiting until \d\d:\d\d:\d\d: why", lines[2])
        assert lines[3].startswith("0 of 1 images, 1.5 kB of 6 kB")

    def test_a_wait_is_said_and_the_heartbeat_goes_on(self, monkeypatch, capsys):
        monkeypatch.setattr(preload_progress, "REPORT_INTERVAL", 0.0)
        with preload_progress.open_view(as_json=False) as show:
            show({"event": "waiting", "upstream": "docker.io", "reason": "why", "until": 0.0})
            show({"event": "plan", "images": 1, "size": 10, "missing": 10, "shortfall": 5})
            show({"event": "resumed", "upstream": "docker.io"})
        said = capsys.readouterr().err
        assert re.search(r"docker.io: waiting until \d\d:\d\d:\d\d: why\n", said)
        assert "the store has no room for 5 B of it: what does not fit is left out\n" in said
        assert said.count("0 of 0 images") == 3

    def test_what_comes_from_outside_is_escaped(self, capsys):
        with preload_progress.open_view(as_json=False) as show:
            show({"event": "failed", "image": "a\x1b[2J", "code": "x", "reason": "b\x07"})
        assert capsys.readouterr().out == "a\\x1b[2J: failed: b\\x07\n"
