"""Pulls: what counts as one, where its content came from, and the totals by day."""

import asyncio
from typing import Any

import pytest

from proxy.cli.api_client import AdminClient
from tests.fakes.content import FakeImage, digest_of
from tests.support.program import Program

DAY = 86_400.0
LAYER = b"x" * 100_000


async def get(program: Program, path: str, **query: object) -> Any:
    return await asyncio.to_thread(lambda: AdminClient(program.root).get(path, **query))


async def period(program: Program, days: int = 1) -> dict[str, Any]:
    found = (await get(program, "/api/v1/status"))["traffic"]
    by_days: dict[int, dict[str, Any]] = {one["days"]: one for one in found}
    return by_days[days]


async def results(program: Program) -> dict[str, int]:
    today = await period(program)
    return {name: today[name] for name in ("hits", "partials", "misses") if today[name]}


async def top(program: Program, of: str, **query: object) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in await get(program, "/api/v1/traffic/top", of=of, **query)}


async def pull_as_docker(program: Program, image: FakeImage) -> None:
    """Pull as dockerd does without containerd: by tag, then the manifest of the platform."""
    await program.manifest(image)
    if image.manifest != image.digest:
        await program.manifest(image, image.manifest)
    for digest in dict.fromkeys(image.blobs):
        await program.blob(digest, image.repository)


@pytest.mark.parametrize("how", ["containerd", "docker"])
@pytest.mark.parametrize("index", [False, True])
async def test_a_pull_is_one_pull_however_the_client_asks(registry, program, how, index):
    image = registry.add_image(layers=[LAYER], index=index)
    for _ in range(2):
        await (program.pull(image) if how == "containerd" else pull_as_docker(program, image))
        await program.wait_for_downloads()
    assert await results(program) == {"misses": 1, "hits": 1}
    name = f"docker.io/{image.repository}:{image.tag}"
    assert {name: one["pulls"] for name, one in (await top(program, "image")).items()} == {name: 2}


async def test_a_pull_whose_layers_were_partly_stored_is_partial(registry, program):
    first = registry.add_image("me/one", layers=[LAYER])
    await program.pull(first)
    await program.wait_for_downloads()
    second = registry.add_image("me/one", layers=[LAYER, b"y" * 50_000], tag="v2")
    await program.pull(second)
    assert await results(program) == {"misses": 1, "partials": 1}


async def test_what_a_prefetch_had_ready_in_time_came_from_upstream(registry, make_program):
    program = await make_program(fetch={"prefetch": "layers"})
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image, image.tag)
    await program.manifest(image, image.manifest)
    await program.wait_for_downloads()
    layer = await program.blob(image.layers[0])
    assert layer.headers["Cache-Status"] == "pullcache; hit"
    assert await results(program) == {"misses": 1}
    purpose = "pullcache_upstream_bytes_total"
    assert await program.metric(purpose, kind="blob", purpose="prefetch") >= len(LAYER)
    assert await program.metric(purpose, kind="blob", purpose="client") == 0


async def test_a_preload_is_no_pull_and_leaves_the_hit_ratio_of_clients(registry, program):
    image = registry.add_image(layers=[LAYER])

    def preload() -> None:
        api = AdminClient(program.root)
        list(api.stream("POST", "/api/v1/preload", {"images": [{"image": "app:latest"}]}))

    await asyncio.to_thread(preload)
    today = await period(program)
    assert (today["pulls"], today["hit_ratio"]) == (0, None)
    assert today["preloaded_bytes"] > len(LAYER)
    assert today["saved_bytes"] == -today["preloaded_bytes"]
    await program.pull(image)
    status = await get(program, "/api/v1/status")
    assert (await results(program), status["hit_ratio"]) == ({"hits": 1}, 1)
    assert status["traffic"][0]["hit_ratio"] == 1
    received = "pullcache_upstream_bytes_total"
    assert await program.metric(received, kind="blob", purpose="preload") > len(LAYER)
    assert await program.metric(received, kind="blob", purpose="client") == 0


async def test_after_ten_minutes_a_request_belongs_to_no_pull_and_the_pull_is_counted(
    registry, program
):
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image, image.tag)
    await period(program)
    assert await program.metric("pullcache_pulls_total") == 0
    program.clock.advance(601)
    await program.blob(image.layers[0])
    assert await results(program) == {"misses": 1}
    assert await program.metric("pullcache_pulls_total", result="miss") == 1
    images = await top(program, "image")
    assert [one["sent_bytes"] < len(LAYER) for one in images.values()] == [True]


async def test_repeated_pulls_of_one_client_are_counted_each(registry, program):
    image = registry.add_image(layers=[LAYER])
    for _ in range(5):
        await program.manifest(image, image.tag)
    assert await results(program) == {"misses": 1, "hits": 4}
    for _ in range(3):
        await program.manifest(image, image.tag)
    today = await period(program)
    assert (today["pulls"], today["hits"], today["requests"]) == (8, 7, 8)


async def test_a_pull_by_digest_is_counted_each_time(registry, program):
    image = registry.add_image(layers=[LAYER])
    for _ in range(3):
        await program.manifest(image, image.digest)
    assert await results(program) == {"misses": 1, "hits": 2}
    assert [*await top(program, "image")] == [f"docker.io/{image.repository}@{image.digest}"]


async def test_a_signature_that_a_client_asks_for_is_no_pull_of_its_own(registry, program):
    image = registry.add_image(layers=[LAYER])
    await program.pull(image)
    tag = image.digest.replace(":", "-") + ".sig"
    registry.add_image(image.repository, layers=[b"sig"], tag=tag)
    assert (await program.manifest(image, tag)).status == 200
    assert (await period(program))["pulls"] == 1


async def test_failed_requests_are_no_pulls(program):
    assert (await program.manifest("me/unknown")).status == 404
    assert (await period(program))["pulls"] == 0
    assert await top(program, "repository") == {}


async def test_totals_survive_a_restart_and_are_summed_by_day(registry, program):
    image = registry.add_image(layers=[LAYER])
    await program.pull(image)
    await program.wait_for_downloads()
    await period(program)
    program.clock.advance(3 * DAY)
    await program.pull(image)
    clock = program.clock
    await program.restart()
    assert program.clock is clock
    today, week, month = [await period(program, days) for days in (1, 7, 30)]
    assert (today["hits"], today["misses"], today["pulls"]) == (1, 0, 1)
    assert (week["hits"], week["misses"]) == (month["hits"], month["misses"]) == (1, 1)
    assert week["saved_bytes"] == week["sent_bytes"] - week["received_bytes"] > len(LAYER)
    days = await get(program, "/api/v1/traffic", days=7)
    assert [(one["name"], one["pulls"]) for one in days] == [("docker.io", 1), ("docker.io", 1)]
    assert days[0]["day"] > days[1]["day"]
    program.clock.advance(10 * DAY)
    assert [(await period(program, days))["pulls"] for days in (1, 7, 30)] == [0, 0, 2]


async def test_the_top_is_by_pulls_or_by_bytes(registry, program):
    small, large = registry.add_image("me/small", layers=[b"s"]), registry.add_image("me/large")
    blob = registry.add_blob(b"z" * 300_000, "me/large")
    for _ in range(3):
        await program.manifest(small, small.tag)
    await program.manifest(large, large.tag)
    await program.blob(blob, "me/large")
    names = ["docker.io/me/small", "docker.io/me/large"]
    assert [*await top(program, "repository")] == names
    assert [*await top(program, "repository", by="bytes")] == names[::-1]
    assert [*await top(program, "repository", limit=1)] == names[:1]
    (client,) = (await top(program, "client")).values()
    assert (client["name"], client["pulls"]) == ("127.0.0.1", 4)
    assert client["sent_bytes"] > 300_000


async def test_no_clients_are_kept_if_the_configuration_says_so(registry, program):
    image = registry.add_image(layers=[LAYER])
    await program.pull(image)
    assert [*await top(program, "client")] == ["127.0.0.1"]
    assert await program.reload(statistics={"clients": False})
    assert await top(program, "client") == {}
    await program.pull(image)
    assert await top(program, "client") == {}
    assert (await top(program, "repository"))["docker.io/library/app"]["pulls"] == 2


async def test_manifests_served_while_upstream_allows_no_pulls_are_counted(registry, program):
    registry.pull_limit = 1
    image = registry.add_image(layers=[LAYER])
    await program.manifest(image, image.tag)
    for _ in range(3):
        await program.manifest(image, image.tag)
    assert (await period(program))["avoided"] == 3
    assert await program.metric("pullcache_ratelimited_avoided_total") == 3


async def test_traffic_is_attributed_to_the_repository_that_fetched_it(registry, program):
    image = registry.add_image("me/app", layers=[LAYER])
    await program.pull(image)
    await program.wait_for_downloads()
    (one,) = (await top(program, "repository")).values()
    assert one["received_bytes"] == one["sent_bytes"] > len(LAYER)
    assert digest_of(LAYER) in image.layers
