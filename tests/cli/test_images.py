"""`pullcache images`, `inspect`, `rm`, `pin`, `unpin`, `check-offline`: output, exit codes."""

import json

import pytest

from tests.fakes.content import digest_of
from tests.fakes.images import blobs_of, push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OWN, pull_parts
from tests.support.commands import run, run_on, run_on_terminal

HISTORY = [{"created_by": "ADD rootfs / # buildkit"}, {"created_by": "RUN make all # buildkit"}]
SHORT = len("sha256:") + 12


@pytest.fixture
async def app(registry, program):
    """`app:v1`, an index of which only the platform of this machine is cached."""
    made = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE, history=HISTORY),
        FOREIGN: push_manifest(registry, APP, [b"other"], platform=FOREIGN),
    }
    index = push_index(registry, APP, "v1", made)
    await pull_parts(program, APP, "v1", made[NATIVE], *blobs_of(registry, APP, made[NATIVE]))
    return made | {"index": index}


async def test_images_are_a_table_that_is_not_truncated_in_a_pipe(registry, program, app):
    alone = push_manifest(registry, "me/alone", [b"alone"])
    await pull_parts(program, "me/alone", alone)
    done = await run_on(program, "images")
    assert (done.exit_code, done.stderr) == (0, "")
    header, first, second = done.stdout.splitlines()
    assert header.split() == [
        "IMAGE",
        "PLATFORMS",
        "SIZE",
        "UNIQUE",
        "CACHED",
        "PULLED",
        "TRUST",
        "STATUS",
    ]
    assert first.startswith("app:v1 ")
    assert f" {NATIVE}, 1 absent " in first
    assert first.rstrip().endswith("complete")
    assert second.split()[0] == f"me/alone@{alone}"
    assert "partial, " in second


async def test_images_are_filtered_and_sorted(registry, program, app):
    push_manifest(registry, "me/large", [bytes(50_000)], tag="v1")
    await pull_parts(program, "me/large", "v1", digest_of(bytes(50_000)))
    by_size = json.loads((await run_on(program, "images", "--sort", "size", "--json")).stdout)
    assert [image["name"] for image in by_size] == ["me/large:v1", "app:v1"]
    by_name = json.loads((await run_on(program, "images", "v1", "--json")).stdout)
    assert [image["name"] for image in by_name] == ["app:v1", "me/large:v1"]
    assert json.loads((await run_on(program, "images", "none", "--json")).stdout) == []


async def test_rm_takes_globs_over_the_stored_images(registry, program):
    for name in ("me/app", "me/other", "you/app"):
        await program.pull(registry.add_image(name))
    done = await run_on(program, "rm", "me/*", "--dry-run")
    assert done.stdout.startswith("would remove me/app:latest\nwould remove me/other:latest\n")
    done = await run_on(program, "rm", "me/*", "you/app")
    assert done.stdout.startswith("removed me/app:latest\nremoved me/other:latest\nremoved you/")
    assert json.loads((await run_on(program, "images", "--json")).stdout) == []
    done = await run_on(program, "rm", "me/*")
    assert (done.exit_code, "me/* is not in the store" in done.stderr) == (1, True)


async def test_rm_removes_nothing_if_a_glob_matches_a_pinned_image(registry, program):
    for name in ("me/app", "me/other"):
        await program.pull(registry.add_image(name))
    await run_on(program, "pin", "me/other")
    done = await run_on(program, "rm", "me/*")
    assert (done.exit_code, "me/other:latest is pinned" in done.stderr) == (1, True)
    assert len(json.loads((await run_on(program, "images", "--json")).stdout)) == 2


async def test_a_pin_of_an_image_that_is_not_stored_says_so(program, app):
    done = await run_on(program, "pin", "app:v1", "app:typo")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == "pinned app:v1\npinned app:typo; it is not stored yet\n"


async def test_inspect_shows_layers_and_the_commands_that_created_them(program, app):
    done = await run_on(program, "inspect", "app:v1")
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"digest     {app['index']}\n" in done.stdout
    assert f"platform   {NATIVE} (complete, " in done.stdout
    (layer,) = [line for line in done.stdout.splitlines() if digest_of(OWN) in line]
    assert layer.split()[3] == "yes"
    assert layer.rstrip().endswith("RUN make all")
    assert f"\nabsent     {FOREIGN}\n" in done.stdout
    document = json.loads((await run_on(program, "inspect", "app:v1", "--json")).stdout)
    assert document["digest"] == app["index"]


async def test_inspect_by_digest_shows_no_age_of_a_tag(program, app):
    tagged = (await run_on(program, "inspect", "app:v1")).stdout
    assert "\ncached     " in tagged
    assert "\nlast pull  " in tagged
    done = await run_on(program, "inspect", f"app@{app[NATIVE]}")
    assert done.exit_code == 0
    assert "- ago" not in done.stdout


async def test_an_unknown_image_is_exit_code_1_and_one_line(program):
    for command in (["inspect"], ["rm"], ["rm", "--dry-run"]):
        done = await run_on(program, *command, "app:none")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == (
            "pullcache: app:none is not in the store; pullcache images lists stored images\n"
        )


async def test_rm_prints_what_it_frees_and_a_dry_run_removes_nothing(program, app):
    (image,) = json.loads((await run_on(program, "images", "--json")).stdout)
    done = await run_on(program, "rm", "--dry-run", "app:v1")
    assert done.stdout.startswith("would remove app:v1\nwould free ")
    assert done.stdout.endswith(" in 5 blobs\n")
    assert len(program.stored()) == 5
    done = await run_on(program, "rm", "app:v1", "--json")
    assert json.loads(done.stdout) == {"images": ["app:v1"], "blobs": 5, "bytes": image["unique"]}
    assert program.stored() == set()


async def test_a_pinned_image_is_kept_until_it_is_unpinned(program, app):
    done = await run_on(program, "pin", "app:v1", "redis:7")
    assert (done.exit_code, done.stdout) == (
        0,
        "pinned app:v1\npinned redis:7; it is not stored yet\n",
    )
    shown = (await run_on(program, "images")).stdout
    assert "complete, pinned" in shown
    assert "absent, pinned" in shown
    assert "pinned     " in (await run_on(program, "status")).stdout
    done = await run_on(program, "rm", "app:v1")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "app:v1 is pinned; unpin it first, or use --force" in done.stderr
    done = await run_on(program, "unpin", "app:v1", "app:v2")
    assert (done.stdout, done.stderr) == ("unpinned app:v1\n", "1 of 2 were not pinned\n")
    assert (await run_on(program, "rm", "app:v1")).exit_code == 0


class TestCheckOffline:
    """The exit code is 0 only if every image could be pulled without a network."""

    async def test_complete_images_are_exit_code_0(self, program, app):
        done = await run_on(program, "check-offline", "app:v1")
        assert (done.exit_code, done.stderr) == (0, "all can be pulled offline\n")
        assert done.stdout.splitlines()[1].split() == ["app:v1", NATIVE, "complete"]

    async def test_every_entry_of_a_list_is_checked(self, registry, program, app):
        (program.root / "blobs/sha256" / digest_of(OWN).removeprefix("sha256:")).unlink()
        lines = f"app:v1\napp:v1 platform={FOREIGN}\nredis\nBad Name\n"
        done = await run_on(program, "check-offline", "-f", "-", stdin=lines)
        assert done.exit_code == 1
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        assert [row[:3] for row in rows] == [
            ["app:v1", NATIVE, "partial"],
            ["app:v1", FOREIGN, "absent"],
            ["redis:latest", NATIVE, "absent"],
        ]
        assert rows[0][3] == digest_of(OWN)[:SHORT]
        assert "3 of 3 cannot be pulled offline; at least " in done.stderr
        assert ":4: " in done.stderr

    async def test_an_invalid_entry_is_exit_code_1_too(self, program, app):
        done = await run_on(program, "check-offline", "-f", "-", stdin="app:v1\nBad Name\n")
        assert done.exit_code == 1
        assert "complete" in done.stdout

    async def test_the_platform_option_overrides_the_platforms_of_a_list(self, program, app):
        arguments = ("-f", "-", "--platform", NATIVE, "--json")
        done = await run_on(
            program, "check-offline", *arguments, stdin=f"app:v1 platform={FOREIGN}"
        )
        (check,) = json.loads(done.stdout)
        assert (check["platform"], check["state"], done.exit_code) == (NATIVE, "complete", 0)

    def test_without_images_it_is_a_usage_error(self, tmp_path):
        done = run("check-offline", "--store", tmp_path / "store")
        assert done.exit_code == 2
        assert "pass images, or an image list with -f" in done.stderr


async def test_all_of_them_work_without_a_daemon(program, app):
    await program.stop()
    assert "complete" in (await run_on(program, "images")).stdout
    assert (await run_on(program, "check-offline", "app:v1")).exit_code == 0
    assert (await run_on(program, "pin", "app:v1")).exit_code == 0
    assert "pinned     yes" in (await run_on(program, "inspect", "app:v1")).stdout
    assert (await run_on(program, "rm", "--force", "app:v1")).exit_code == 0
    await program.start()
    assert program.stored() == set()


@pytest.mark.parametrize("option", [(), ("--no-trunc",)], ids=["truncated", "complete"])
async def test_on_a_terminal_digests_are_truncated(program, app, option):
    shown = await run_on_terminal(program, "inspect", "app:v1", *option, columns=160)
    assert digest_of(OWN)[:SHORT] in shown
    assert (digest_of(OWN) in shown) is bool(option)


async def test_preloaded_images_that_no_client_has_pulled_are_found(registry, program):
    images = {}
    for name in ("me/wanted", "me/forgotten"):
        images[name] = registry.add_image(name, layers=[name.encode() * 100])
        assert (await run_on(program, "preload", name)).exit_code == 0
    assert "never" in (await run_on(program, "inspect", "me/wanted")).stdout
    program.clock.advance(100)
    await program.pull(images["me/wanted"])
    found = json.loads((await run_on(program, "images", "--json")).stdout)
    pulled = {one["name"]: one["pulled"] for one in found}
    assert pulled == {"me/wanted:latest": program.clock(), "me/forgotten:latest": None}
    text = (await run_on(program, "images", "--never-pulled")).stdout
    assert "me/forgotten" in text
    assert "me/wanted" not in text
    document = json.loads((await run_on(program, "inspect", "--json", "me/wanted")).stdout)
    assert document["pulled"] == program.clock()


async def test_what_is_no_pull_leaves_the_last_pull(registry, program, tmp_path):
    image = registry.add_image(layers=[b"x" * 1000])
    await program.manifest(image, image.digest)  # by digest: the tag has the same content
    await program.manifest(image, method="HEAD")
    at = program.clock()
    program.clock.advance(5000)
    assert (await run_on(program, "preload", "app")).exit_code == 0
    bundle = tmp_path / "bundle.tar"
    assert (await run_on(program, "export", "app", "-o", str(bundle))).exit_code == 0
    assert (await run_on(program, "import", str(bundle))).exit_code == 0
    (found,) = [
        one
        for one in json.loads((await run_on(program, "images", "--json")).stdout)
        if one["name"] == "app:latest"
    ]
    assert found["pulled"] == at
    assert found["used"] > at
