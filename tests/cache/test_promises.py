"""The promises of the program, each tested on the whole of it."""

import asyncio
import os
import re

import pytest

from tests.fakes.content import OCI_MANIFEST, digest_of
from tests.fakes.faults import Fault
from tests.fakes.raw_client import RawClient
from tests.support.program import read

MIB = 1 << 20
BLOB = bytes(range(256)) * (4 * MIB // 256)


async def test_many_clients_share_one_upstream_transfer(registry, program):
    digest = registry.add_blob(BLOB)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=release))
    started = 0

    async def client() -> bytes:
        nonlocal started
        async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
            assert response.status == 200
            body: bytes = await response.content.readexactly(MIB // 2)
            started += 1
            if started == 24:
                # Every client has its first bytes although upstream has sent only a quarter.
                assert registry.bytes_sent(registry.body_of(digest)) == MIB
                release.set()
            rest, _ = await read(response)
            return body + rest

    bodies = await asyncio.gather(*(client() for _ in range(24)))
    assert {digest_of(body) for body in bodies} == {digest}
    assert registry.count(registry.body_of(digest)) == 1
    assert registry.bytes_sent(registry.body_of(digest)) == len(BLOB)
    assert registry.count(f"GET /v2/.*{digest}") == 2  # with and without a token


async def test_a_slow_client_slows_no_other_and_a_client_that_disconnects_stops_nothing(
    registry, program
):
    content = bytes(16 * MIB)
    digest = registry.add_blob(content)
    target = f"/v2/library/app/blobs/{digest}"
    slow = await RawClient.connect(program.url, receive_buffer=4096)
    slow.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await slow.read(1)
    leaving = await RawClient.connect(program.url)
    leaving.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await leaving.read(1)
    await leaving.close()
    async with asyncio.timeout(10):
        assert (await program.blob(digest)).digest == digest
    await slow.close()
    assert registry.bytes_sent(registry.body_of(digest)) == len(content)


@pytest.mark.parametrize("offset", [0, len(BLOB) // 2, len(BLOB) - 1])
async def test_no_client_ever_receives_a_complete_blob_whose_digest_was_not_verified(
    registry, program, offset
):
    digest = registry.add_blob(BLOB)
    registry.fail(registry.body_of(digest), Fault(flip_at=offset), times=2)
    answers = await asyncio.gather(*(program.blob(digest) for _ in range(5)))
    for answer in answers:
        assert answer.digest == digest or not answer.is_whole or answer.status >= 400
        assert answer.status >= 400 or len(answer.body) < len(BLOB) or answer.digest == digest
    registry.heal()
    await program.wait_for_upstream()
    again = await program.blob(digest)
    assert (again.status, again.digest) == (200, digest)
    await program.wait_for_downloads()
    assert program.stored() == {digest}


async def test_the_byte_cap_is_never_exceeded(registry, make_program, tiny_disk):
    # On a file system of its own, the used space is exact at any moment.
    disk = tiny_disk(100_000_000)
    program = await make_program(disk / "store", store={"max_size": "20MB"})
    sizes = [6 * MIB] * 10 + [40_000_000]
    digests = [registry.add_blob(bytes([n]) * size) for n, size in enumerate(sizes)]
    done = asyncio.Event()

    def used_space() -> int:
        status = os.statvfs(disk)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    async def watch_peak() -> int:
        peak = 0
        while not done.is_set():
            peak = max(peak, used_space())
            await asyncio.sleep(0)
        return peak

    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(watch_peak())
        for digest in digests:
            answer = await program.blob(digest)
            assert (answer.status, answer.digest, answer.is_whole) == (200, digest, True)
        done.set()
    assert 10_000_000 < watcher.result() <= 20_000_000
    assert digests[-1] not in program.stored()
    assert {digests[8], digests[9]} <= program.stored()


async def test_bytes_and_digests_are_never_rewritten(registry, program):
    layer = digest_of(b"layer")
    content = (
        b'{ "schemaVersion" : 2,\n\t"config":{"mediaType":"a","size":5,"digest":"%s"} ,'
        b'"layers":[ ],"mediaType":"%s","unknown":{"\xc3\xa9":"\\u00e9 <&>"} }\n\n'
    ) % (layer.encode(), OCI_MANIFEST.encode())
    digest = registry.add_manifest("library/app", "odd", content, OCI_MANIFEST)
    for reference in ("odd", digest):
        answer = await program.manifest("library/app", reference)
        assert answer.body == content
        assert answer.headers["Docker-Content-Digest"] == digest
        assert answer.headers["Content-Type"] == OCI_MANIFEST
    compressed = b"\x1f\x8b\x08 not really gzip"
    blob = registry.add_blob(compressed)
    encoded = Fault(headers={"Content-Encoding": "gzip"})
    registry.fail(registry.body_of(blob), encoded)
    for _ in range(2):
        got = await program.blob(blob, Accept_Encoding="gzip, zstd")
        assert got.body == compressed
        assert "Content-Encoding" not in got.headers


async def test_cached_digests_are_served_without_asking_upstream(registry, program):
    image = registry.add_image(index=True, layers=[b"one", b"two"])
    await program.pull(image)
    await program.wait_for_downloads()
    before = len(registry.requests)
    await program.pull(image)
    async with registry.down():
        await program.pull(image)
    assert len(registry.requests) == before


async def test_a_tag_is_revalidated_only_after_its_ttl_and_by_head(registry, program):
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(599)
    before = len(registry.requests)
    assert (await program.manifest(image)).digest == image.digest
    assert len(registry.requests) == before
    program.clock.advance(2)
    assert (await program.manifest(image)).digest == image.digest
    assert [seen.method for seen in registry.requests[before:]] == ["HEAD"]
    assert registry.pulls == 1


async def test_a_stale_manifest_is_served_while_upstream_fails(registry, program):
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(100_000)
    async with registry.down():
        answer = await program.manifest(image)
    assert (answer.status, answer.digest) == (200, image.digest)
    assert "fwd=stale" in answer.headers["Cache-Status"]


async def test_the_start_needs_no_network(registry, program):
    image = registry.add_image(index=True, layers=[b"one", b"two"])
    await program.pull(image)
    await program.wait_for_downloads()
    await registry.stop()
    await program.restart()
    program.clock.advance(100_000)
    await program.pull(image)


async def test_an_outage_loses_nothing_that_was_committed(registry, program):
    image = registry.add_image(layers=[b"one"])
    await program.pull(image)
    registry.add_image("library/other")
    async with registry.down():
        assert (await program.manifest("library/other")).status == 503
        await program.pull(image)
    await program.pull(image)


async def test_private_content_is_not_served_under_another_repository(registry, program):
    image = registry.add_image("me/secret", layers=[b"secret"])
    registry.repository("me/public").blobs[digest_of(b"x")] = b"x"
    await program.pull(image)
    for digest in (*image.blobs, image.digest):
        kind = "manifests" if digest == image.digest else "blobs"
        for method in ("GET", "HEAD"):
            answer = await program.ask(f"/v2/me/public/{kind}/{digest}", method)
            assert answer.status == 404
            assert b"secret" not in answer.body


async def test_every_response_has_a_cache_status(registry, program):
    image = registry.add_image()
    requests = [
        ("/v2/", "GET"),
        ("/v2/_catalog", "GET"),
        (f"/v2/library/app/manifests/{image.tag}", "GET"),
        (f"/v2/library/app/manifests/{image.tag}", "HEAD"),
        ("/v2/library/app/manifests/none", "GET"),
        (f"/v2/library/app/blobs/{image.config}", "GET"),
        (f"/v2/library/app/blobs/{digest_of(b'none')}", "GET"),
        ("/v2/library/app/tags/list", "GET"),
        (f"/v2/library/app/referrers/{image.digest}", "GET"),
        ("/v2/UPPER/manifests/x", "GET"),
        ("/v2/library/app/blobs/uploads/", "POST"),
        ("/nowhere", "GET"),
    ]
    for target, method in requests:
        answer = await program.ask(target, method)
        status = answer.headers["Cache-Status"]
        assert re.fullmatch(r"pullcache(; ?[a-z]+(=[\w\"%/:. -]+)?)*", status), status
    assert "fwd=miss" in (await program.blob(image.layers[0])).headers["Cache-Status"]
    await program.wait_for_downloads()
    assert "hit" in (await program.blob(image.layers[0])).headers["Cache-Status"]
