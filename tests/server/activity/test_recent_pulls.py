"""The recent pulls: what operators see of them, and of those that failed."""

import asyncio
from typing import Any

import pytest

from proxy.server.activity import recent_pulls
from tests.fakes.faults import Fault
from tests.support.admin_api import call, remove_images
from tests.support.htpasswd import basic_auth, write_htpasswd
from tests.support.openapi import validate
from tests.support.program import Program

DOCKER = "docker/27.5.1 go/go1.22.11 os/linux arch/amd64"


async def pulls(program: Program, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/pulls", **query)
    for one in found:
        validate(one, "PullRecord")
    return found


async def clients(program: Program) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await call(program, "get", "/api/v1/pulls/clients")
    for one in found:
        validate(one, "ClientRecord")
    return found


async def test_a_pull_shows_image_client_result_bytes_and_seconds(registry, program):
    image = registry.add_image(layers=[b"x" * 50_000], index=True)
    program.session.headers["User-Agent"] = DOCKER
    await program.pull(image)
    await program.wait_for_downloads()
    await pulls(program)
    program.clock.advance(700)
    await program.pull(image)
    hit, miss = await pulls(program)
    assert (miss["result"], hit["result"]) == ("miss", "hit")
    assert miss["image"] == "docker.io/library/app:latest"
    assert miss["digest"] == image.digest
    assert (miss["client"], miss["agent"], miss["user"]) == ("127.0.0.1", "docker/27.5.1", "")
    assert miss["requests"] == hit["requests"] >= 4
    assert 50_000 < miss["sent_bytes"] == hit["sent_bytes"] < 60_000
    assert miss["seconds"] > 0
    assert (miss["problem"], hit["at"] - miss["at"]) == ("", 700)
    (client,) = await clients(program)
    assert (client["client"], client["pulls"], client["failed"]) == ("127.0.0.1", 2, 0)
    assert client["sent_bytes"] == 2 * miss["sent_bytes"]
    assert client["last_image"] == miss["image"]


async def test_equal_pulls_of_one_client_in_a_row_are_one_entry_that_counts_them(registry, program):
    image = registry.add_image(layers=[b"x"])
    await program.manifest(image)
    for _ in range(5):
        await program.manifest(image)
    latest, first = await pulls(program)
    assert (first["result"], first["repeated"]) == ("miss", 0)
    assert (latest["result"], latest["repeated"], latest["requests"]) == ("hit", 4, 5)
    assert [one["pulls"] for one in await clients(program)] == [6]


async def test_a_pull_that_fails_says_why(registry, make_program):
    program = await make_program(fetch={"attempts": 1})
    async with registry.down():
        for _ in range(3):
            assert (await program.manifest("library/app")).status >= 500
    (failed,) = await pulls(program, result="problems")
    assert (failed["result"], failed["requests"]) == ("failed", 3)
    assert failed["image"] == "docker.io/library/app:latest"
    assert "docker.io" in failed["problem"]
    assert [one["failed"] for one in await clients(program)] == [1]
    program.clock.advance(recent_pulls.FAILURE_WINDOW + 1)
    assert (await program.manifest("library/app")).status == 404
    assert "denied access" in (await pulls(program))[0]["problem"]
    assert len(await pulls(program)) == 2


async def test_a_client_that_gives_up_before_the_answer_is_shown(registry, program):
    release = asyncio.Event()
    registry.fail("/manifests/", Fault(until_headers=release), times=None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await program.manifest("library/app")
    (failed,) = await pulls(program, wait=10)
    assert (failed["result"], failed["image"]) == ("failed", "docker.io/library/app:latest")
    assert "disconnected" in failed["problem"]
    release.set()


async def test_an_image_that_is_not_allowed_is_refused(make_program, registry):
    program = await make_program(upstreams={"docker.io": {"url": registry.url, "allow": ["me/*"]}})
    assert (await program.manifest("other/app")).status == 403
    assert (await program.ask("/v2/other/app/tags/list")).status == 403
    (refused,) = await pulls(program)
    assert (refused["result"], refused["image"]) == ("refused", "other/app:latest")


async def test_a_layer_that_fails_is_the_failure_of_its_pull_until_it_is_pulled(registry, program):
    image = registry.add_image(layers=[b"x" * 50_000])
    registry.fail(registry.body_of(image.layers[0]), Fault(status=500), times=None)
    await program.manifest(image)
    assert (await program.blob(image.layers[0])).status != 200
    (failed,) = await pulls(program)
    assert failed["result"] == "failed"
    assert failed["problem"]
    registry.heal()
    await program.wait_for_upstream()
    assert (await program.blob(image.layers[0])).status == 200
    found = {one["image"]: one for one in await pulls(program)}
    assert found["docker.io/library/app:latest"]["result"] == "miss"


async def test_a_manifest_that_fails_by_digest_is_shown_by_the_tag_that_was_asked_for(
    registry, program
):
    image = registry.add_image(layers=[b"x"])
    assert (await program.manifest(image, method="HEAD")).status == 200
    await remove_images(program, "app:latest")
    registry.fail("/manifests/", Fault(status=500), times=None)
    assert (await program.manifest(image, image.digest)).status >= 500
    unknown = "sha256:" + "0" * 64
    assert (await program.manifest("me/other", unknown)).status >= 500
    assert [one["image"] for one in await pulls(program)] == [
        f"docker.io/me/other@{unknown}",
        "docker.io/library/app:latest",
    ]


async def test_signatures_that_do_not_exist_and_the_pulls_of_doctor_are_not_listed(program):
    assert (await program.manifest("library/app", f"sha256-{'0' * 64}.sig")).status == 404
    assert (await program.manifest("me/app", User_Agent="pullcache-doctor")).status == 404
    assert (await program.blob("sha256:" + "0" * 64)).status == 404
    assert (await program.ask("/nothing")).status == 404
    assert await pulls(program) == []


async def test_a_tag_that_could_not_be_checked_is_a_stale_pull(registry, make_program):
    program = await make_program(fetch={"attempts": 1})
    image = registry.add_image(layers=[b"x"])
    await program.pull(image)
    program.clock.advance(100_000)
    async with registry.down():
        assert (await program.manifest(image)).status == 200
        assert (await pulls(program))[0]["result"] == "stale"


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    return write_htpasswd(tmp_path_factory.mktemp("users") / "htpasswd", ann="secret")


async def test_the_user_is_shown_if_clients_log_in(registry, make_program, users):
    program = await make_program(server={"htpasswd": users})
    image = registry.add_image(layers=[b"x"])
    assert (await program.manifest(image)).status == 401
    for _ in range(2):
        answer = await program.manifest(image, Authorization=basic_auth("ann", "secret"))
        assert answer.status == 200
    assert {one["user"] for one in await pulls(program)} == {"ann"}
    assert [one["user"] for one in await clients(program)] == ["ann"]
    answer = await program.manifest(image, Authorization=basic_auth("ann", "wrong"))
    assert answer.status == 401
    assert (await pulls(program))[0]["result"] == "refused"


async def test_pulls_are_selected_by_image_client_result_and_number(registry, program):
    for name in ("me/one", "me/two", "me/three"):
        await program.pull(registry.add_image(name, layers=[name.encode()]))
    names = [one["image"] for one in await pulls(program, image="me/T")]
    assert names == [f"docker.io/me/{one}:latest" for one in ("three", "two")]
    assert await pulls(program, client="10.0.0.1") == []
    assert len(await pulls(program, client="127.0.0.1", result="miss")) == 3
    latest = await pulls(program, limit=1)
    older = await pulls(program, before=latest[0]["number"], limit=1)
    assert older[0]["image"] == "docker.io/me/two:latest"


async def test_a_request_waits_for_the_next_change(registry, program):
    image = registry.add_image(layers=[b"x"])
    await program.pull(image)
    revision = max(one["revision"] for one in await pulls(program))
    assert await pulls(program, after=revision) == []
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(pulls(program, after=revision, wait=30))
        await program.manifest(image)
        (changed,) = await waiting
    assert changed["revision"] > revision
    assert await pulls(program, after=changed["revision"], wait=0.5) == []


async def test_only_the_latest_pulls_failures_and_clients_are_remembered(
    registry, program, monkeypatch
):
    monkeypatch.setattr(recent_pulls, "MAX_RECENT_PULLS", 3)
    monkeypatch.setattr(recent_pulls, "MAX_RECENT_CLIENTS", 2)
    await program.restart(server={"trusted_proxies": ["127.0.0.1"]})
    for number in range(5):
        address = f"10.0.0.{number}"
        await program.manifest(f"me/app{number}", X_Forwarded_For=address)
    assert [one["image"][-8] for one in await pulls(program)] == ["4", "3", "2"]
    assert [one["client"] for one in await clients(program)] == ["10.0.0.4", "10.0.0.3"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "%0d%0aX", "a" * 5000])
async def test_paths_that_are_no_images_are_listed_in_a_bounded_form(program, name):
    assert (await program.ask(f"/v2/{name}/manifests/latest")).status in (400, 404)
    (failed,) = await pulls(program)
    assert len(failed["image"]) <= 200
