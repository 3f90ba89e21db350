"""The audit trail: which acts are recorded, by whom, with which outcome; and what was evicted."""

import asyncio
import os
from typing import Any, get_args

import pytest

from proxy.cli.api_client import AdminClient
from proxy.cli.commands.events import ACTIONS
from proxy.errors import DeniedError, UnknownManifestError
from proxy.storage.records import trail
from proxy.storage.records.trail import Action
from tests.support.bundles import export_bundle, import_bundle
from tests.support.program import Program

APP = "docker.io/library/app:latest"
ME = f"uid {os.geteuid()} pid {os.getpid()}"


async def call(program: Program, method: str, *args: Any, **query: object) -> Any:
    return await asyncio.to_thread(
        lambda: getattr(AdminClient(program.root), method)(*args, **query)
    )


async def events(program: Program, **query: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/events", **query)
    return found


async def only(program: Program, **query: object) -> dict[str, Any]:
    (event,) = await events(program, **query)
    return event


async def preload(program: Program, **body: object) -> list[dict[str, Any]]:
    return await asyncio.to_thread(
        lambda: list(AdminClient(program.root).stream("POST", "/api/v1/preload", body))
    )


async def pulled(registry: Any, program: Program, repository: str = "library/app") -> Any:
    image = registry.add_image(repository, layers=[repository.encode() * 50_000])
    await program.pull(image)
    await program.wait_for_downloads()
    return image


async def test_who_removed_an_image_and_when(registry, program):
    await pulled(registry, program)
    program.clock.advance(50)
    await call(program, "post", "/api/v1/images/remove", {"images": ["app"]})
    event = await only(program, image="app:latest")
    assert (event["action"], event["actor"], event["outcome"]) == ("remove", ME, "done")
    assert (event["at"], event["images"]) == (program.clock(), {APP: 0})
    assert event["detail"].startswith("freed ")


async def test_an_act_that_failed_is_recorded_with_the_reason(registry, program):
    await pulled(registry, program)
    await call(program, "post", "/api/v1/images/pin", {"images": ["app"]})
    with pytest.raises(DeniedError):
        await call(program, "post", "/api/v1/images/remove", {"images": ["app"]})
    with pytest.raises(UnknownManifestError):
        await call(program, "post", "/api/v1/images/remove", {"images": ["gone"]})
    gone, pinned, pin = await events(program)
    assert (gone["outcome"], gone["images"]) == ("failed", {"docker.io/library/gone:latest": 0})
    assert (pinned["outcome"], pin["outcome"], pin["action"]) == ("failed", "done", "pin")
    assert "is pinned" in pinned["detail"]


async def test_what_only_looks_is_not_recorded(registry, program):
    await pulled(registry, program)
    body = {"images": ["app"], "dry_run": True}
    await call(program, "post", "/api/v1/images/remove", body)
    await preload(program, images=[{"image": "app"}], dry_run=True)
    await call(program, "get", "/api/v1/images/inspect", image="app")
    assert await events(program) == []


async def test_every_act_is_recorded(registry, program):
    await pulled(registry, program)
    await import_bundle(program, await export_bundle(program, "app"))
    await call(program, "post", "/api/v1/images/pin", {"images": ["app"]})
    await call(program, "post", "/api/v1/images/unpin", {"images": ["app"]})
    await preload(program, images=[{"image": "app"}])
    for is_offline in (True, True, False):
        await call(program, "put", "/api/v1/offline", {"offline": is_offline})
    digest = (await program.manifest("library/app")).headers["Docker-Content-Digest"]
    await call(
        program,
        "post",
        "/api/v1/policy/exceptions",
        {"image": f"app@{digest}", "seconds": 60, "reason": "an incident"},
    )
    assert await program.reload(manifests={"ttl": "1h"})
    found = await events(program)
    assert [one["action"] for one in reversed(found)] == [
        "export",
        "import",
        "pin",
        "unpin",
        "preload",
        "offline",
        "online",
        "exception",
        "reload",
    ]
    assert {one["outcome"] for one in found} == {"done"}
    assert {one["actor"] for one in found} == {ME, "SIGHUP"}
    by_action = {one["action"]: one for one in found}
    assert by_action["import"]["images"] == by_action["export"]["images"] == {APP: 0}
    assert by_action["exception"]["detail"] == "for 60 s: an incident"
    assert await only(program, action="offline") == by_action["offline"]


async def test_a_reload_that_failed_is_recorded(program):
    assert not await program.reload(manifests={"ttl": "soon"})
    event = await only(program)
    assert (event["action"], event["outcome"]) == ("reload", "failed")


async def test_the_name_of_a_token_is_the_actor(registry, make_program, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-long-enough-token-for-ci")
    program = await make_program(
        server={
            "admin_listen": ["127.0.0.1:0"],
            "admin_tokens": [{"name": "ci", "file": str(token), "role": "operate"}],
        }
    )
    url = f"http://{program.admin_addresses[0]}/api/v1/images/pin"
    headers = {"Authorization": "Bearer a-long-enough-token-for-ci"}
    async with program.session.post(url, json={"images": ["app"]}, headers=headers) as response:
        assert response.status == 200
    assert (await only(program))["actor"] == "token ci"


async def test_evictions_are_summed_by_image(registry, make_program):
    program = await make_program(store={"max_size": "4MB", "min_free": "0B"})
    first = registry.add_image("me/first", layers=[os.urandom(900_000), os.urandom(900_000)])
    await program.pull(first)
    await program.wait_for_downloads()
    await program.pull(registry.add_image("me/second", layers=[os.urandom(1_500_000)]))
    await program.wait_for_downloads()
    event = await only(program, image="me/first")
    assert (event["action"], event["detail"]) == ("evict", "size")
    assert event["images"]["docker.io/me/first:latest"] >= 900_000
    program.running._core.space.evictions.add("size", "docker.io/me/first:latest", 5)
    program.running._core.space.evictions.add("size", "docker.io/me/other:latest", 7)
    assert (await events(program, image="me/other"))[0]["images"] == {
        "docker.io/me/other:latest": 7
    }
    assert await events(program, image="me/second") == []
    assert await events(program, image="me/first:other") == []


async def test_a_schedule_is_recorded_if_it_fetched_or_failed(registry, make_program):
    registry.add_image(layers=[b"x" * 1000])
    program = await make_program(preload=[{"images": ["app", "gone"]}])
    async with asyncio.timeout(20):
        while len(found := await events(program)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert {one["actor"] for one in found} == {"schedule preload[1]"}
    assert [(one["outcome"], [*one["images"]]) for one in found] == [
        ("done", [APP]),
        ("failed", ["docker.io/library/gone:latest"]),
    ]
    assert found[0]["detail"].startswith("1 of 2 complete, 1 fetched, ")
    assert found[1]["detail"].startswith("1 of 2, ")


async def test_each_image_of_a_preload_has_its_own_outcome(registry, program):
    await pulled(registry, program)
    await preload(program, images=[{"image": "app"}, {"image": "gone"}])
    done, failed = await only(program, image="app"), await only(program, image="gone")
    assert (done["outcome"], failed["outcome"]) == ("done", "failed")
    assert done["detail"] == "1 of 2 complete, 0 fetched, 0 bytes"
    await preload(program, images=[{"image": "gone"}])
    assert (await events(program))[0]["outcome"] == "failed"
    assert (await events(program, image="app")) == [done]


async def test_the_trail_is_bounded_and_evictions_do_not_push_out_acts(program, monkeypatch):
    monkeypatch.setattr(trail, "MAX_ACTS", 3)
    monkeypatch.setattr(trail, "MAX_EVICTIONS", 2)
    for number in range(5):
        await call(program, "post", "/api/v1/images/pin", {"images": [f"app:{number}"]})
    for number in range(4):
        program.running._core.space.evictions.add("size", f"docker.io/me/{number}:1", 10)
        await events(program)
    found = await events(program)
    assert [one["action"] for one in found] == ["evict"] * 2 + ["pin"] * 3
    assert [next(iter(one["images"])) for one in found[2:]] == [
        f"docker.io/library/app:{number}" for number in (4, 3, 2)
    ]


async def test_a_trail_that_cannot_be_written_fails_nothing(program, monkeypatch):
    def fail(*_: object) -> None:
        import sqlite3  # noqa: PLC0415

        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(trail, "add_rows", fail)
    assert await call(program, "post", "/api/v1/images/pin", {"images": ["app"]})
    assert await events(program) == []


async def test_events_are_selected_by_time_and_number(program):
    for number in range(3):
        await call(program, "post", "/api/v1/images/pin", {"images": [f"app:{number}"]})
        program.clock.advance(10)
    assert len(await events(program, since=program.clock() - 25)) == 2
    assert [[*one["images"]] for one in await events(program, limit=1)] == [
        ["docker.io/library/app:2"]
    ]


def test_the_command_offers_the_actions_that_the_daemon_records():
    assert get_args(Action) == ACTIONS
