"""`pullcache refresh`: what upstream says now, whatever the age of the cached tags."""

import asyncio
import json

from proxy.cli.api_client import AdminClient
from tests.fakes.faults import Fault
from tests.support.commands import run_on, run_on_terminal
from tests.support.openapi import validate


async def test_a_moved_tag_is_served_at_once(registry, program):
    before = registry.add_image("me/app")
    await program.pull(before)
    registry.requests.clear()
    after = registry.add_image("me/app", layers=[b"new"])
    assert (await program.manifest("me/app")).digest == before.digest
    done = await run_on(program, "refresh", "me/app")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"me/app:latest: moved to {after.digest}, was {before.digest}\n"
    assert (await program.manifest("me/app")).digest == after.digest
    assert (await run_on(program, "refresh", "me/app")).stdout == "me/app:latest: unchanged\n"
    assert registry.count("/blobs/") == 0


async def test_all_and_globs_are_the_stored_tags(registry, program):
    for name in ("me/app", "me/other", "you/app"):
        await program.pull(registry.add_image(name))
    found = json.loads((await run_on(program, "refresh", "me/*", "--json")).stdout)
    assert {one["image"]: one["outcome"] for one in found} == {
        "me/app:latest": "unchanged",
        "me/other:latest": "unchanged",
    }
    for one in found:
        validate(one, "RefreshedTag")
    assert len((await run_on(program, "refresh", "--all")).stdout.splitlines()) == 3


async def test_a_tag_that_was_missing_is_asked_about_in_spite_of_its_memory(registry, program):
    image = registry.add_image("me/app")
    assert (await program.manifest("me/app", "new")).status == 404
    registry.move_tag("me/app", "new", image.digest)
    assert (await program.manifest("me/app", "new")).status == 404
    done = await run_on(program, "refresh", "me/app:new")
    assert done.stdout == f"me/app:new: new, {image.digest}\n"
    assert (await program.manifest("me/app", "new")).status == 200


async def test_a_tag_that_upstream_has_no_more_is_gone(registry, program):
    await program.pull(registry.add_image("me/app"))
    registry.fail("/manifests/latest", Fault(status=404), times=None)
    done = await run_on(program, "refresh", "me/app")
    assert (done.exit_code, done.stdout.startswith("me/app:latest: gone: ")) == (0, True)
    assert (await program.manifest("me/app")).status == 404


async def test_a_tag_that_was_never_there_is_not_found(registry, program):
    await program.pull(registry.add_image("me/app"))
    done = await run_on(program, "refresh", "me/app:9")
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.startswith("me/app:9: not found upstream: ")
    assert (await run_on(program, "refresh", "me/app", "me/app:9")).exit_code == 4


async def test_tags_that_upstream_did_not_answer_for_stay_as_they_are(registry, program):
    for name in ("me/app", "me/other"):
        await program.pull(registry.add_image(name))
    registry.fail("/me/app/manifests/", Fault(status=500), times=None)
    done = await run_on(program, "refresh", "--all")
    assert done.exit_code == 4
    assert "me/app:latest: failed: " in done.stdout
    assert "me/other:latest: unchanged" in done.stdout
    assert (await program.manifest("me/app")).status == 200
    assert (await run_on(program, "refresh", "me/app")).exit_code == 1


async def test_many_tags_are_asked_about_a_few_at_a_time(registry, program):
    for number in range(30):
        await program.manifest(registry.add_image(f"me/app{number}"))
    done = await run_on(program, "refresh", "--all")
    assert done.stdout.count(": unchanged") == 30


async def test_wrong_requests_say_what_to_do(registry, program):
    image = registry.add_image("me/app")
    for arguments, reason in (
        ([], "pass images, or --all"),
        (["me/app", "--all"], "pass images, or --all"),
        ([f"me/app@{image.digest}"], "is a digest, which always means the same"),
        (["you/*"], "you/* is not in the store"),
        (["other.example/app"], "is not configured"),
    ):
        done = await run_on(program, "refresh", *arguments)
        assert done.exit_code in (1, 2)
        assert reason in done.stderr


async def test_the_trail_has_who_has_refreshed_what(registry, program):
    await program.pull(registry.add_image("me/app"))
    await run_on(program, "refresh", "me/app")
    events = await asyncio.to_thread(AdminClient(program.root).get, "/api/v1/events")
    (event,) = [one for one in events if one["action"] == "refresh"]
    assert [*event["images"]] == ["docker.io/me/app:latest"]
    assert event["detail"] == "1 unchanged"


async def test_the_trail_has_the_outcome_of_each_image(registry, program):
    for name in ("me/app", "me/other"):
        await program.pull(registry.add_image(name))
    registry.fail("/me/app/manifests/", Fault(status=500), times=None)
    await run_on(program, "refresh", "--all")
    await run_on(program, "refresh", "me/app")
    client = AdminClient(program.root)

    async def outcomes(image: str) -> list[tuple[str, str]]:
        found = await asyncio.to_thread(client.get, "/api/v1/events", image=image)
        return [(one["outcome"], one["detail"]) for one in found]

    assert await outcomes("me/app") == [("failed", "1 failed"), ("failed", "1 of 2 failed")]
    assert await outcomes("me/other") == [("done", "1 of 2 unchanged")]


async def test_digests_are_short_on_a_terminal(registry, program):
    await program.pull(registry.add_image("me/app"))
    after = registry.add_image("me/app", layers=[b"new"])
    shown = await run_on_terminal(program, "refresh", "me/app", columns=60)
    assert f"moved to {after.digest[:19]}, was" in " ".join(shown.split())
