"""`pullcache policy`: output and exit codes."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes.hub import FakeHub, HubRepository
from tests.support.commands import run, run_on
from tests.support.openapi import validate
from tests.support.program import Program

TRUSTED = {"images": ["docker.io/*"], "mode": "enforce", "trusted": ["official"], "min_age": "3d"}
FIRST_SIGHT = "its age is not known, and this cache never served it before"
RULE = (
    'policy 1: trusted = ["official"], min_age = "3d", unripe = "previous", first_seen = "allow", '
    'unknown = "deny"'
)
REST = "--for 7d --reason TEXT"


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    async with FakeHub() as hub:
        hub.repositories += [HubRepository("acme/app")]
        yield hub


@pytest.fixture
async def program(registry, hub, make_program) -> Program:
    upstream = {"url": registry.url, "facts_url": hub.url}
    made: Program = await make_program(upstreams={"docker.io": upstream}, policy=[TRUSTED])
    return made


async def test_check_prints_a_table_and_exits_1_if_an_image_is_refused(registry, program):
    registry.add_image("library/nginx")
    registry.add_image("acme/app")
    done = await run_on(program, "policy", "check", "nginx", "acme/app:latest")
    assert done.exit_code == 1
    assert [line.rstrip() for line in done.stdout.splitlines()[1:]] == [
        f"docker.io/library/nginx:latest  allow     1       {FIRST_SIGHT}",
        "docker.io/acme/app:latest       deny      1       it is not official",
    ]
    allowed = await run_on(program, "policy", "check", "nginx")
    assert allowed.exit_code == 0


async def test_check_asks_and_serves_nothing(registry, program):
    image = registry.add_image("library/nginx")
    await run_on(program, "policy", "check", "nginx")
    listed = json.loads((await run_on(program, "images", "--json")).stdout)
    assert not [one for one in listed if one["name"].endswith(":latest")]
    assert image.digest


async def test_check_says_why_an_image_could_not_be_had(program):
    done = await run_on(program, "policy", "check", "acme/none")
    assert done.exit_code == 1
    assert "error" in done.stdout
    assert "unknown_name" in done.stdout or "upstream_unauthorized" in done.stdout


async def test_check_exits_0_in_audit_mode(registry, program):
    assert await program.reload(policy=[{**TRUSTED, "mode": "audit"}])
    registry.add_image("acme/app")
    done = await run_on(program, "policy", "check", "acme/app")
    assert done.exit_code == 0
    assert "deny (audit)" in done.stdout


async def test_check_speaks_the_protocol_of_containerds_image_verifiers(registry, program):
    image = registry.add_image("acme/app")
    arguments = ("-name", "docker.io/acme/app:latest", "-digest", image.digest)
    done = await run_on(
        program, "policy", "check", "--containerd", *arguments,
        "-stdin-media-type", "application/vnd.oci.image.manifest.v1+json",
    )  # fmt: skip
    assert done.exit_code == 1
    assert done.stdout == (
        f"policy 1 refuses docker.io/acme/app@{image.digest}: it is not official\n"
    )
    nginx = registry.add_image("library/nginx")
    arguments = ("-name", "docker.io/library/nginx:latest", "-digest", nginx.digest)
    assert (await run_on(program, "policy", "check", "--containerd", *arguments)).exit_code == 0


def test_a_verifier_that_cannot_ask_refuses_and_says_why_on_stdout(tmp_path):
    arguments = ("-name", "docker.io/library/nginx:latest", "-digest", "sha256:" + "0" * 64)
    config = tmp_path / "pullcache.toml"
    config.write_text("nonsense = 1")
    done = run("policy", "check", "--containerd", "-c", config, *arguments)
    assert done.exit_code == 1
    assert done.stdout.startswith(
        "pullcache cannot check docker.io/library/nginx:latest@sha256:0000"
    )
    assert "nonsense" in done.stdout


async def test_why_names_the_rule_and_how_to_except_the_image(registry, program):
    image = registry.add_image("acme/app")
    done = await run_on(program, "policy", "why", "acme/app")
    assert done.stdout.splitlines() == [
        "policy 1 refuses docker.io/acme/app:latest: it is not official",
        f"digest: {image.digest}",
        RULE,
        f"to allow it for a week: pullcache policy except docker.io/acme/app@{image.digest} {REST}",
    ]


async def test_of_a_tag_that_has_moved_the_content_that_stands_in_is_named(registry, program):
    old = registry.add_image("library/nginx")
    await program.pull(old)
    program.clock.advance(86_400)
    new = registry.add_image("library/nginx", layers=[b"new"])
    checked = await run_on(program, "policy", "check", "nginx")
    assert checked.exit_code == 0
    assert "docker.io/library/nginx:latest  previous  1       it is 1s old" in checked.stdout
    why = await run_on(program, "policy", "why", "nginx")
    first, *rest = why.stdout.splitlines()
    assert first.startswith(
        "policy 1 holds back new content of docker.io/library/nginx:latest: it is"
    )
    assert rest[:2] == [f"digest: {new.digest}", f"served meanwhile: {old.digest}"]
    assert rest[-1].startswith(
        "to allow it for a week: pullcache policy except docker.io/library/nginx@"
    )
    assert (await program.manifest(new)).digest == old.digest


async def test_why_exits_1_if_the_image_cannot_be_had(program):
    done = await run_on(program, "policy", "why", "acme/none")
    assert done.exit_code == 1
    assert "acme/none cannot be checked" in done.stdout


async def test_without_decisions_the_list_says_so(program):
    done = await run_on(program, "policy", "decisions", "--since", "2h")
    assert done.exit_code == 0
    assert done.stderr == "no decisions in the last 2h; plain hits are not listed\n"


async def test_an_exception_allows_an_image_until_it_ends(registry, program):
    image = registry.add_image("acme/app", index=True)
    assert (await program.manifest(image)).status == 403
    name = f"acme/app@{image.digest}"
    done = await run_on(program, "policy", "except", name, "--for", "7d", "--reason", "CVE-2026-1")
    assert done.exit_code == 0
    await program.pull(image)
    await program.restart()
    await program.pull(image)
    listed = await run_on(program, "policy", "list")
    assert f"docker.io/{name}" in listed.stdout
    assert "CVE-2026-1" in listed.stdout
    program.clock.advance(8 * 86_400)
    assert (await program.manifest(image)).status == 403


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("acme/app:latest", "--for", "7d", "--reason", "x"), "an exception is for a digest"),
        (("acme/app@sha256:" + "0" * 64, "--for", "soon", "--reason", "x"), "is not a duration"),
        (("acme/app@sha256:" + "0" * 64, "--for", "9000d", "--reason", "x"), "seconds"),
    ],
)
async def test_an_exception_that_cannot_be_made_is_an_error_that_says_why(
    program, arguments: tuple[str, ...], message: str
):
    done = await run_on(program, "policy", "except", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


async def test_decisions_are_listed_with_their_reasons_also_after_a_restart(registry, program):
    await program.manifest(registry.add_image("acme/app"))
    await program.restart()
    done = await run_on(program, "policy", "decisions", "--since", "36500d", "--json")
    (decision,) = json.loads(done.stdout)
    assert (decision["decision"], decision["policy"]) == ("deny", 1)
    assert decision["image"] == "docker.io/acme/app:latest"
    table = await run_on(program, "policy", "decisions", "--since", "36500d", "--decision", "deny")
    assert "it is not official" in table.stdout


async def test_documents_match_their_schemas(registry, program):
    registry.add_image("acme/app")
    for arguments, schema in (
        (("policy", "list", "--json"), "PolicyOverview"),
        (("policy", "check", "acme/app", "--json"), "PolicyCheck"),
    ):
        document: Any = json.loads((await run_on(program, *arguments)).stdout)
        validate(document[0] if isinstance(document, list) else document, schema)


async def test_images_check_offline_and_export_judge_nothing_and_show_the_verdict(
    registry, program, tmp_path
):
    image = registry.add_image("acme/app")
    assert await program.reload(policy=[{**TRUSTED, "mode": "audit"}])
    await program.pull(image)
    await program.wait_for_downloads()
    listed = await run_on(program, "images")
    assert "complete, refused by policy 1 (audit)" in listed.stdout
    assert await program.reload(policy=[TRUSTED])
    checked = await run_on(program, "check-offline", "acme/app")
    assert checked.exit_code == 0
    assert "complete, refused by policy 1" in checked.stdout
    assert (
        "all can be pulled offline; policies refuse 1: see pullcache policy why" in checked.stderr
    )
    exported = await run_on(program, "export", "acme/app", "-o", str(tmp_path / "app.tar"))
    assert exported.exit_code == 0
    assert "docker.io/acme/app:latest: refused by policy 1: it is not official\n" in exported.stderr
    inspected = await run_on(program, "inspect", "acme/app")
    assert "refused by policy 1: it is not official" in inspected.stdout


async def test_a_list_without_policies_says_so(make_program):
    program = await make_program()
    done = await run_on(program, "policy", "list")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no policies are configured\n")
