"""`pullcache preload`: output, exit codes, lock files, and its progress on a terminal."""

import asyncio
import json
import re
from typing import Any

import pytest

from proxy.cli.display import preload_progress
from proxy.cli.display.preload_progress import ProgressTracker
from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OWN, check_images
from tests.support.commands import run, run_on, run_on_terminal

LAYER = bytes(range(256)) * 4000


@pytest.fixture
def app(registry):
    """`app:v1`, an index with the platform of this machine and another."""
    made = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [LAYER], platform=FOREIGN),
    }
    return made | {"index": push_index(registry, APP, "v1", made)}


async def test_stdout_has_a_line_for_each_image_and_stderr_the_rest(program, app):
    done = await run_on(program, "preload", "app:v1")
    assert done.exit_code == 0
    assert re.fullmatch(r"app:v1: Pull complete, [\d.]+ kB of [\d.]+ kB fetched\n", done.stdout)
    assert re.fullmatch(
        r"1 image, [\d.]+ kB, [\d.]+ kB to fetch\n"
        r"1 image, 1 fetched \([\d.]+ kB\), 0 up to date, 0 failed\n",
        done.stderr,
    )
    done = await run_on(program, "preload", "app:v1")
    assert (done.exit_code, done.stdout) == (0, "app:v1: Image is up to date\n")


async def test_image_lists_of_any_format_are_read_and_invalid_entries_named_by_line(
    program, app, tmp_path
):
    compose = tmp_path / "compose.yaml"
    compose.write_text("services:\n  web: {image: app:v1}\n  bad: {image: Bad Name}\n")
    plain = f"docker.io/library/app:v1 platform={FOREIGN}\napp:none\n"
    done = await run_on(program, "preload", "-f", str(compose), "-f", "-", stdin=plain)
    assert done.exit_code == 4
    assert f"{compose}:3: 'Bad Name' is not" in done.stderr
    assert "app:v1: Pull complete" in done.stdout
    assert "app:none: failed: " in done.stdout
    states = await check_images(program, "app:v1", {"image": "app:v1", "platforms": [FOREIGN]})
    assert [check["state"] for check in states] == ["complete", "complete"]


async def test_if_all_images_fail_the_exit_code_is_1(program, app, tmp_path):
    assert (await run_on(program, "preload", "app:none")).exit_code == 1
    assert (await run_on(program, "preload", "-f", "-", stdin="Bad Name\n")).exit_code == 1


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


async def test_all_platforms_pin_and_dry_run_reach_the_daemon(program, app):
    done = await run_on(program, "preload", "app:v1", "--dry-run", "-j", "1")
    assert (done.exit_code, re.sub(r"[\d.]+ kB", "", done.stdout)) == (
        0,
        "app:v1: would be fetched, \n",
    )
    assert digest_of(OWN) not in program.stored()
    done = await run_on(program, "preload", "app:v1", "--all-platforms", "--pin")
    assert digest_of(LAYER) in program.stored()
    (image,) = json.loads((await run_on(program, "images", "--json")).stdout)
    assert image["pinned"]


async def test_with_json_stdout_is_the_events(program, app):
    done = await run_on(program, "preload", "app:v1", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["resolving", "totals"]
    assert done.stderr == ""


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_a_signature_that_could_not_be_fetched_is_named_and_the_exit_code_is_4(
    registry, program, app, tmp_path, options
):
    tag = f"{app['index'].replace(':', '-')}.sig"
    push_manifest(registry, APP, [b"signature"], tag=tag)
    registry.fail(f"/manifests/{tag}", Fault(status=500), times=None)
    lock = tmp_path / "images.lock"
    done = await run_on(program, "preload", "app:v1", *options, "--lock", str(lock))
    assert done.exit_code == 4
    assert f"app:v1: {tag}, which refers to it, could not be fetched: " in done.stderr
    if not options:
        assert "app:v1: Pull complete" in done.stdout
        assert "0 failed, 1 referrer missing" in done.stderr
    (entry,) = json.loads(lock.read_text())["images"]
    (missing,) = entry["missing_referrers"]
    assert (missing["subject"], missing["reference"]) == (app["index"], tag)
    assert "500" in missing["reason"]
    # The lock file is a list of images as any other.
    registry.heal()
    done = await run_on(program, "preload", "-f", str(lock), "--lock", str(lock))
    assert done.exit_code == 0
    assert "missing_referrers" not in lock.read_text()


async def test_a_list_of_referrers_that_could_not_be_fetched_is_named(registry, program, app):
    registry.fail("/referrers/", Fault(status=500), times=None)
    done = await run_on(program, "preload", "app:v1")
    assert done.exit_code == 4
    assert f"app:v1: what refers to {app['index']} could not be listed: " in done.stderr


class TestLock:
    """A lock file pins a preload to the digests that were fetched."""

    async def test_as_an_image_list_it_results_in_the_same_images(
        self, registry, make_program, app, tmp_path
    ):
        program = await make_program()
        push_manifest(registry, "me/plain", [b"plain"], tag="v1", platform=FOREIGN)
        lock = tmp_path / "images.lock"
        lock.write_text("an older file")
        images = ["me/plain:v1", "app:v1"]
        done = await run_on(program, "preload", *images, "--platform", FOREIGN, "--lock", str(lock))
        assert done.exit_code == 0
        document = json.loads(lock.read_text())
        assert [entry["image"] for entry in document["images"]] == [
            "docker.io/library/app:v1",
            "docker.io/me/plain:v1",
        ]
        assert document["images"][0]["digest"] == app["index"]
        assert document["images"][0]["platforms"] == [FOREIGN]
        again = tmp_path / "again.lock"
        await run_on(
            program, "preload", *reversed(images), "--platform", FOREIGN, "--lock", str(again)
        )
        assert again.read_bytes() == lock.read_bytes()
        assert not list(tmp_path.glob(".*")), "a temporary file"
        # The tag moves, the digest in the lock file does not.
        newer = push_manifest(registry, APP, [b"newer"], platform=FOREIGN)
        push_index(registry, APP, "v1", {FOREIGN: newer})
        other = await make_program(tmp_path / "other")
        done = await run_on(other, "preload", "-f", str(lock))
        assert done.exit_code == 0
        assert digest_of(LAYER) in other.stored()
        assert digest_of(b"newer") not in other.stored()
        assert digest_of(OWN) not in other.stored()
        assert (await run_on(other, "check-offline", "-f", str(lock))).exit_code == 0

    async def test_failed_images_are_not_in_it(self, program, app, tmp_path):
        lock = tmp_path / "images.lock"
        done = await run_on(program, "preload", "app:v1", "app:none", "--lock", str(lock))
        assert done.exit_code == 4
        (entry,) = json.loads(lock.read_text())["images"]
        assert entry["image"] == "docker.io/library/app:v1"

    async def test_all_platforms_are_recorded_as_such(self, program, app, tmp_path):
        lock = tmp_path / "images.lock"
        await run_on(program, "preload", "app:v1", "--all-platforms", "--lock", str(lock))
        assert json.loads(lock.read_text())["images"][0]["platforms"] == ["all"]
        done = await run_on(program, "check-offline", "-f", str(lock))
        assert (done.exit_code, len(done.stdout.splitlines())) == (0, 3)


async def test_without_a_daemon_it_fetches_the_images_itself_and_runs_no_scheduled_preload(
    registry, program, app, tmp_path
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


async def test_a_terminal_shows_bars_like_docker_pull(registry, program, app):
    push_manifest(registry, APP, [LAYER], tag="slow", platform=NATIVE)
    registry.throttle(700_000)
    shown = await run_on_terminal(program, "preload", "app:slow", "app:none", exit_code=4)
    layer = digest_of(LAYER).partition(":")[2][:12]
    assert re.search(rf"{layer}: Downloading +\[=*>? *\] [\d.]+ kB/1.02 MB", shown)
    assert re.search(r"of 2 images, [\d.]+ kB of 1.02 MB, [\d.]+ kB/s, \d s left", shown)
    assert "app:slow: Pull complete, 1.02 MB of 1.02 MB fetched" in shown
    assert "app:none: failed: " in shown
    assert "2 images, 1 fetched (1.02 MB), 0 up to date, 1 failed" in shown


class TestProgress:
    """What is shown after a sequence of events."""

    now = 0.0

    def track(self, *events: dict[str, Any]) -> ProgressTracker:
        """Record one event a second."""
        tracker = ProgressTracker(lambda: self.now)
        for event in events:
            self.now += 1
            tracker.record(event)
        return tracker

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

    def test_bytes_of_an_earlier_download_do_not_count_towards_the_rate(self):
        tracker = self.track(
            *self.resolved("a", ("a", 1000, False), ("b", 500, True)),
            self.layer("a", "downloading", 600, resumed=500),
            self.layer("b", "exists", 500),
            self.layer("c", "complete", 7000),
        )
        assert tracker.summary() == "0 of 1 image, 600 B of 1 kB, 33 B/s, 12 s left"

    def test_on_a_small_screen_active_layers_are_shown_first(self):
        layers = [(name, 1000, False) for name in "abcdef"]
        tracker = self.track(
            *self.resolved("a", *layers),
            self.layer("a", "complete", 1000),
            self.layer("e", "downloading", 500),
            {"event": "waiting", "upstream": "docker.io", "reason": "why", "until": 0.0},
        )
        lines = preload_progress._render_lines(tracker, 60, 5)
        assert [line.partition(" ")[2] for line in lines[:2]] == [
            "Pulling fs layer",
            "Downloading        500 B/1 kB",
        ]
        assert re.fullmatch(r"docker.io: waiting until \d\d:\d\d:\d\d: why", lines[2])
        assert lines[3].startswith("0 of 1 image, 1.5 kB of 6 kB")

    def test_waiting_is_reported_and_the_progress_lines_go_on(self, monkeypatch, capsys):
        monkeypatch.setattr(preload_progress, "REPORT_INTERVAL", 0.0)
        with preload_progress.open_view(as_json=False) as show:
            show({"event": "waiting", "upstream": "docker.io", "reason": "why", "until": 0.0})
            show({"event": "plan", "images": 1, "size": 10, "missing": 10, "shortfall": 5})
            show({"event": "resumed", "upstream": "docker.io"})
        text = capsys.readouterr().err
        assert re.search(r"docker.io: waiting until \d\d:\d\d:\d\d: why\n", text)
        assert "the store has no space for 5 B; images that do not fit are skipped\n" in text
        assert text.count("0 of 0 images") == 3

    def test_text_from_outside_is_escaped(self, capsys):
        with preload_progress.open_view(as_json=False) as show:
            show({"event": "failed", "image": "a\x1b[2J", "code": "x", "reason": "b\x07"})
        assert capsys.readouterr().out == "a\\x1b[2J: failed: b\\x07\n"


async def test_without_waiting_an_outage_fails_at_once(registry, program):
    await registry.stop()
    done = await run_on(program, "preload", "me/app", "--no-wait", "--json")
    await registry.start()
    assert done.exit_code == 1
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert "failed" in events
    assert "waiting" not in events
