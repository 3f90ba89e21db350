"""The blobs of a preload: verified, linked, and shared with the downloads of clients."""

import asyncio

from tests.fakes.content import OCI_MANIFEST, digest_of
from tests.fakes.faults import Fault
from tests.fakes.images import push_manifest
from tests.fakes.registry import FakeRegistry
from tests.preload.images import push_app
from tests.support.admin_api import (
    APP,
    BASE,
    NATIVE,
    OWN,
    check_images,
)
from tests.support.preload_api import run_preload, start_preload

# Blobs come from the fake registry's CDN.
CDN_REQUESTS = "GET /registry-v2/"


async def test_a_layer_with_another_size_than_its_descriptor_states_fails_the_image(
    registry, program
):
    digest = push_manifest(registry, APP, [BASE], tag="v1", platform=NATIVE)
    content = registry.repository(APP).manifests[digest].content
    wrong = content.replace(b'"size": 4000', b'"size": 4001')
    assert wrong != content
    registry.add_manifest(APP, "v1", wrong, OCI_MANIFEST)
    run = await run_preload(program, "app:v1")
    assert "has 4000 bytes, not 4001" in run.events_of("failed")[0]["reason"]


async def test_blobs_of_another_repository_are_linked_and_not_fetched_again(registry, program):
    for repository in (APP, "me/copy"):
        push_app(registry, repository=repository)
    await run_preload(program, "app:v1")
    registry.requests.clear()
    run = await run_preload(program, "me/copy:v1")
    assert run.events_of("done")
    assert {one.bytes_sent for one in registry.seen(CDN_REQUESTS)} == {1}
    assert (await check_images(program, "me/copy:v1"))[0]["state"] == "complete"


async def test_blobs_of_another_upstream_are_fetched_and_complete_the_image(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(upstreams={"other.test": {"url": other.url}})
        for one in (registry, other):
            push_app(one)
        await run_preload(program, "app:v1")
        run = await run_preload(program, f"other.test/{APP}:v1")
        assert run.events_of("done")
        assert other.bytes_sent(other.body_of(digest_of(OWN))) == len(OWN)
        assert (await check_images(program, f"other.test/{APP}:v1"))[0]["state"] == "complete"
        async with registry.down(), other.down():
            answer = await program.blob(digest_of(OWN), f"other.test/{APP}")
            assert answer.digest == digest_of(OWN)


async def test_a_blob_that_a_client_pulls_at_the_same_time_is_fetched_once(registry, program):
    digests = push_app(registry)
    release = asyncio.Event()
    body = registry.body_of(digest_of(OWN))
    registry.fail(body, Fault(stall_at=100, until=release), times=1)
    await program.manifest(APP, "v1")
    await program.manifest(APP, digests[NATIVE])
    async with start_preload(program, "app:v1") as run, asyncio.TaskGroup() as group:
        await run.wait_for("layer", digest=digest_of(OWN), state="downloading")
        pulled = group.create_task(program.blob(digest_of(OWN)))
        release.set()
        await run.wait_for("totals")
    assert pulled.result().body == OWN
    assert registry.count(body) == 1


async def test_disconnecting_stops_a_preload_and_the_next_one_resumes_its_downloads(
    registry, program
):
    registry.referrers = False
    layer = bytes(range(256)) * 8192
    push_manifest(registry, APP, [layer], tag="v1", platform=NATIVE)
    release = asyncio.Event()
    body = registry.body_of(digest_of(layer))
    registry.fail(body, Fault(stall_at=len(layer) // 2, until=release), times=1)
    async with start_preload(program, "app:v1") as run:
        await run.wait_for("layer", digest=digest_of(layer), offset=len(layer) // 2)
    await program.wait_for_downloads()
    release.set()
    run = await run_preload(program, "app:v1")
    assert run.events[-1]["fetched"] == len(layer) // 2
    assert registry.seen(body)[-1].headers.get("Range") == f"bytes={len(layer) // 2}-"


async def test_a_download_that_a_client_reads_continues_after_a_disconnect(registry, program):
    layer = bytes(range(256)) * 8192
    push_manifest(registry, APP, [layer], tag="v1", platform=NATIVE)
    release = asyncio.Event()
    body = registry.body_of(digest_of(layer))
    registry.fail(body, Fault(stall_at=len(layer) // 2, until=release), times=1)
    async with asyncio.TaskGroup() as group:
        async with start_preload(program, "app:v1") as run:
            await run.wait_for("layer", digest=digest_of(layer), offset=len(layer) // 2)
            async with program.opened(f"/v2/{APP}/blobs/{digest_of(layer)}") as response:
                await response.content.readany()
                reading = group.create_task(program.blob(digest_of(layer)))
                await asyncio.sleep(0)
        release.set()
        assert (await reading).body == layer
    assert registry.count(body) == 1


async def test_a_client_gets_a_blob_whose_preload_has_just_been_abandoned(registry, program):
    for number in range(5):
        layer = bytes([number]) * 500_000
        push_manifest(registry, APP, [layer], tag=f"v{number}", platform=NATIVE)
        release = asyncio.Event()
        body = registry.body_of(digest_of(layer))
        registry.fail(body, Fault(stall_at=200_000, until=release), times=1)
        async with start_preload(program, f"app:v{number}") as run:
            await run.wait_for("layer", digest=digest_of(layer), state="downloading")
        pulls = [program.blob(digest_of(layer)) for _ in range(3)]
        release.set()
        for answer in await asyncio.gather(*pulls):
            assert (answer.is_whole, answer.body) == (True, layer)


async def test_jobs_limits_the_layers_fetched_at_once(registry, program):
    layers = [bytes([number]) * 1000 for number in range(6)]
    push_manifest(registry, APP, layers, tag="v1", platform=NATIVE)
    release = asyncio.Event()
    registry.fail(CDN_REQUESTS, Fault(until_headers=release), times=None)
    async with start_preload(program, "app:v1", jobs=2) as run:
        await registry.until(lambda: registry.count(CDN_REQUESTS) == 2)
        await run.wait_for("plan")
        assert registry.count(CDN_REQUESTS) == 2
        release.set()
        await run.wait_for("totals")
