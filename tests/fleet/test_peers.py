"""Blobs, manifests and tags from node to node, with a real directory: one transfer for the fleet."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.fleet.keys import FleetKeys, node_id
from proxy.oci.digest import Digest
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.certificates import Authority
from tests.support.fleet import TOKEN, FleetProgram, PeerRelay, running_fleet
from tests.support.program import Program, read
from tests.support.redis_server import RedisServer
from tests.support.tasks import run_all

MIB = 1 << 20


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
async def nodes(tmp_path, registry, server) -> AsyncIterator[list[FleetProgram]]:
    nodes = [FleetProgram(tmp_path / f"node{n}", registry, server) for n in range(3)]
    async with running_fleet(*nodes):
        yield nodes


def blob_bytes(registry: FakeRegistry) -> int:
    return registry.bytes_sent("GET /registry-v2")


async def settle(*nodes: Program) -> None:
    for node in nodes:
        await node.wait_for_downloads()


async def test_a_cold_image_crosses_the_network_from_upstream_once(nodes, registry):
    layers = [os.urandom(MIB), os.urandom(2 * MIB), os.urandom(MIB)]
    image = registry.add_image(layers=layers, index=True)
    await run_all(node.pull(image) for node in nodes for _ in range(4))
    await settle(*nodes)
    size = sum(len(registry.repositories[image.repository].blobs[one]) for one in image.blobs)
    # Each of two nodes asks for the first byte of each blob, as a proof.
    assert size <= blob_bytes(registry) <= size + 2 * len(image.blobs)
    assert registry.count("GET /v2/.*/manifests/.*") - _refused(registry, "GET .*/manifests") == 2
    assert [node.stored() for node in nodes] == [nodes[0].stored()] * 3
    received = [await node.metric("pullcache_peer_bytes_total", direction="in") for node in nodes]
    assert sum(received) >= 2 * size


def _refused(registry: FakeRegistry, match: str) -> int:
    """Return how many requests were challenged for a token."""
    return sum(request.status == 401 for request in registry.seen(match))


async def test_the_response_says_that_a_peer_has_sent_it(nodes, registry):
    image = registry.add_image(layers=[os.urandom(MIB)])
    await nodes[0].pull(image)
    await settle(nodes[0])
    manifest = await nodes[1].manifest(image)
    layer = await nodes[1].blob(image.layers[0])
    for answer in (manifest, layer):
        assert answer.headers["Cache-Status"] == "pullcache; fwd=miss; stored; detail=peer"
    await settle(nodes[1])
    assert (await nodes[1].blob(image.layers[0])).headers["Cache-Status"] == "pullcache; hit"


async def test_a_growing_blob_is_streamed_from_the_node_that_fetches_it(nodes, registry):
    content = os.urandom(2 * MIB)
    digest = registry.add_blob(content)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=release))
    async with nodes[0].opened(f"/v2/library/app/blobs/{digest}") as first:
        await first.content.readexactly(MIB // 2)
        async with nodes[1].opened(f"/v2/library/app/blobs/{digest}") as second:
            # Bytes reach the second node before upstream has sent all of them.
            assert await second.content.readexactly(MIB // 2) == content[: MIB // 2]
            release.set()
            rest, is_whole = await read(second)
            assert (rest, is_whole) == (content[MIB // 2 :], True)
    assert blob_bytes(registry) <= len(content) + 1
    assert await nodes[1].metric("pullcache_peer_requests_total", result="growing") == 1


async def test_what_a_peer_has_evicted_is_fetched_upstream_and_the_directory_learns_it(
    nodes, registry, server
):
    digest = registry.add_blob(b"content " * 1000)
    # The end of the download names the node as a holder. It announces nothing after that, so that the
    # directory names it until another node finds out.
    core = nodes[0].running._core
    await nodes[0].until(lambda: core.directory._holdings._cursor is None)
    core.directory.add_holdings = core.space.on_stored = core.space.on_removed = lambda _: None
    assert (await nodes[0].blob(digest)).status == 200
    await settle(nodes[0])
    (nodes[0].root / "blobs" / "sha256" / digest.partition(":")[2]).unlink()
    answer = await nodes[1].blob(digest)
    assert (answer.status, answer.digest) == (200, digest)
    assert await nodes[1].metric("pullcache_peer_requests_total", result="unknown") == 1
    assert await nodes[1].metric("pullcache_peer_failovers_total") == 0
    await settle(nodes[1])
    third = await nodes[2].blob(digest)
    assert third.digest == digest
    assert await nodes[2].metric("pullcache_peer_requests_total", result="unknown") == 0
    assert await nodes[2].metric("pullcache_peer_requests_total", result="whole") == 1


async def test_upstream_down_and_a_store_emptied_it_gets_all_from_its_peers(
    nodes, registry, tmp_path, server
):
    image = registry.add_image(layers=[os.urandom(MIB)], index=True)
    await nodes[0].pull(image)
    await settle(nodes[0])
    emptied = FleetProgram(tmp_path / "emptied", registry, server)
    await emptied.start()
    async with registry.down():
        await emptied.until(lambda: len(emptied.members) == 3)
        await emptied.pull(image)
        await settle(emptied)
        before = len(registry.requests)
        assert emptied.stored() >= {image.digest, image.manifest, *image.blobs}
    assert len(registry.requests) == before
    await emptied.stop()


async def test_private_content_stays_private_on_every_node(nodes, registry):
    secret = os.urandom(MIB)
    digest = registry.add_blob(secret, "corp/secret")
    assert (await nodes[0].blob(digest, "corp/secret")).status == 200
    await settle(nodes[0])
    for node in nodes:
        assert (await node.blob(digest, "library/app")).status == 404
    async with registry.down():
        for node in nodes:
            assert (await node.blob(digest, "library/app")).status >= 400


async def test_a_repository_that_the_registry_confirms_gets_the_bytes_of_a_peer(nodes, registry):
    content = os.urandom(MIB)
    digest = registry.add_blob(content, "corp/base")
    registry.add_blob(content, "corp/other")
    assert (await nodes[0].blob(digest, "corp/base")).status == 200
    await settle(nodes[0])
    answer = await nodes[1].blob(digest, "corp/other")
    assert answer.digest == digest
    assert blob_bytes(registry) == len(content) + 1


async def test_tags_are_asked_for_once_in_a_fleet(nodes, registry, server):
    first = registry.add_image(layers=[b"one"])
    for node in nodes:
        assert (await node.manifest(first)).digest == first.digest
    second = registry.add_image(layers=[b"two"])
    assert second.digest != first.digest
    for node in nodes:
        node.clock.now += 7200
    server.command("FLUSHALL")
    answers = await run_all(node.manifest(second) for node in nodes)
    assert [answer.digest for answer in answers] == [second.digest] * 3
    heads = registry.seen("HEAD .*/manifests/latest")
    assert sum(request.status == 200 for request in heads) == 1


async def test_an_absent_tag_is_asked_for_once_in_a_fleet(nodes, registry):
    registry.add_image(tag="other")
    for node in nodes:
        assert (await node.manifest("library/app", "missing")).status == 404
    asked = registry.seen("(GET|HEAD) .*/manifests/missing")
    assert len([one for one in asked if one.status == 404]) == 1


async def test_a_limit_of_upstream_is_kept_by_all_nodes(nodes, registry):
    registry.add_image()
    limited = Fault(status=429, headers={"Retry-After": "60"})
    registry.fail("GET .*/manifests/latest", limited, times=None)
    assert (await nodes[0].manifest("library/app")).status == 429
    before = registry.count("GET .*/manifests/latest")
    for node in nodes:
        assert (await node.manifest("library/app")).status == 429
    assert registry.count("GET .*/manifests/latest") == before


async def test_without_the_directory_nodes_work_alone(nodes, registry, server):
    image = registry.add_image(layers=[os.urandom(MIB)])
    await nodes[0].pull(image)
    server.kill()
    for node in nodes:
        await node.pull(image)
    other = registry.add_image(tag="other", layers=[b"another layer"])
    await run_all(node.pull(other) for node in nodes)


async def test_a_transfer_goes_on_while_the_directory_is_away(nodes, registry, server):
    content = os.urandom(2 * MIB)
    digest = registry.add_blob(content)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=MIB, until=release))
    async with nodes[0].opened(f"/v2/library/app/blobs/{digest}") as first:
        await first.content.readexactly(MIB // 2)
        async with nodes[1].opened(f"/v2/library/app/blobs/{digest}") as second:
            await second.content.readexactly(MIB // 2)
            server.kill()
            release.set()
            assert await read(second) == (content[MIB // 2 :], True)
    assert blob_bytes(registry) <= len(content) + 1


@asynccontextmanager
async def run_relayed(
    directory: Path, registry: FakeRegistry, server: RedisServer, **sections: Any
) -> AsyncIterator[tuple[PeerRelay, list[FleetProgram]]]:
    """Run two nodes, the first of which the second reaches through a relay."""
    async with PeerRelay() as relay:
        first = FleetProgram(directory / "first", registry, server, relay=relay)
        second = FleetProgram(directory / "second", registry, server, **sections)
        async with running_fleet(first, second):
            yield relay, [first, second]


@pytest.fixture
async def relayed(
    tmp_path, registry, server
) -> AsyncIterator[tuple[PeerRelay, list[FleetProgram]]]:
    """Two nodes, the first of which the second reaches through a relay."""
    async with run_relayed(tmp_path, registry, server) as found:
        yield found


async def test_wrong_bytes_of_a_peer_are_not_kept_and_upstream_is_asked(relayed, registry):
    relay, (first, second) = relayed
    content = os.urandom(2 * MIB)
    digest = registry.add_blob(content)
    assert (await first.blob(digest)).digest == digest
    await settle(first)
    relay.flip_at = MIB
    broken = await second.blob(digest)
    assert not (broken.is_whole and broken.digest != digest)
    await settle(second)
    assert (await second.blob(digest)).digest == digest
    assert second.stored() == {digest}
    assert await second.metric("pullcache_peer_failovers_total", reason="wrong") == 1
    assert await second.metric("pullcache_digest_mismatches_total") == 0
    # Upstream has sent the blob once to each node, and a byte as the proof.
    assert blob_bytes(registry) == 2 * len(content) + 1


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        ("cut_at", {}),
        ("stall_at", {"fleet": {"stall_timeout": "2s"}}),
        ("slow_at", {"fetch": {"min_rate": "1KB", "stall_timeout": "1s"}}),
    ],
)
async def test_a_transfer_that_a_peer_breaks_off_goes_on_upstream_at_its_offset(
    tmp_path, registry, server, fault, times
):
    async with run_relayed(tmp_path, registry, server, **times) as (relay, (first, second)):
        content = os.urandom(4 * MIB)
        digest = registry.add_blob(content)
        assert (await first.blob(digest)).digest == digest
        await settle(first)
        setattr(relay, fault, 2 * MIB)
        answer = await second.blob(digest)
        assert (answer.digest, answer.is_whole) == (digest, True)
        again = blob_bytes(registry) - len(content)
        assert MIB < again <= 3 * MIB
        reason = "broken" if fault == "cut_at" else "stalled"
        assert await second.metric("pullcache_peer_failovers_total", reason=reason) == 1


async def test_a_peer_that_cannot_be_reached_costs_one_transfer(relayed, registry):
    relay, (first, second) = relayed
    digest = registry.add_blob(os.urandom(MIB))
    assert (await first.blob(digest)).digest == digest
    await settle(first)
    await relay.stop()
    assert (await second.blob(digest)).digest == digest
    assert await second.metric("pullcache_peer_failovers_total", reason="refused") == 1
    await relay.start()


async def test_nodes_speak_tls_with_certificates_of_the_fleets_own_authority(
    tmp_path, registry, server
):
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("node", "IP:127.0.0.1")
    trust = ssl.create_default_context(cafile=str(authority.ca))
    nodes = [
        FleetProgram(
            tmp_path / f"node{n}",
            registry,
            server,
            scheme="https",
            server={"tls_certificate": [certificate], "tls_key": [key]},
            fleet={"ca_file": str(authority.ca)},
            trust=trust,
        )
        for n in range(2)
    ]
    async with running_fleet(*nodes):
        digest = registry.add_blob(os.urandom(MIB))
        for node in nodes:
            assert (await node.blob(digest)).digest == digest
            await settle(node)
        assert await nodes[1].metric("pullcache_peer_bytes_total", direction="in") == MIB


async def test_a_node_with_a_certificate_that_is_not_trusted_is_not_asked(
    tmp_path, registry, server
):
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("node", "IP:127.0.0.1")
    first = FleetProgram(
        tmp_path / "first",
        registry,
        server,
        scheme="https",
        server={"tls_certificate": [certificate], "tls_key": [key]},
        trust=ssl.create_default_context(cafile=str(authority.ca)),
    )
    second = FleetProgram(tmp_path / "second", registry, server)
    async with running_fleet(first, second):
        digest = registry.add_blob(os.urandom(MIB))
        for node in (first, second):
            assert (await node.blob(digest)).digest == digest
            await settle(node)
        assert await second.metric("pullcache_peer_bytes_total", direction="in") == 0
        assert await second.metric("pullcache_peer_failovers_total", reason="refused") == 1


async def test_a_node_that_waits_for_its_turn_is_asked_again(tmp_path, registry, server):
    nodes = [
        FleetProgram(tmp_path / f"node{n}", registry, server, fetch={"max_downloads": 1})
        for n in range(2)
    ]
    async with running_fleet(*nodes):
        large, digest = registry.add_blob(os.urandom(2 * MIB)), registry.add_blob(os.urandom(MIB))
        release = asyncio.Event()
        registry.fail(registry.body_of(large), Fault(stall_at=MIB, until=release))
        async with nodes[0].opened(f"/v2/library/app/blobs/{large}") as first:
            await first.content.readexactly(1000)
            # The first node has asked upstream for the second blob too, and may not receive it yet.
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(node.blob(digest)) for node in nodes]
                await registry.until(lambda: registry.count(registry.body_of(digest)) > 0)
                release.set()
            assert [answer.result().digest for answer in waiting] == [digest] * 2
            assert (await read(first))[1]
        assert blob_bytes(registry) <= 3 * MIB + 2


async def test_nodes_that_name_each_other_as_mirrors_answer_at_once(tmp_path, registry, server):
    nodes = [FleetProgram(tmp_path / f"node{n}", registry, server) for n in range(2)]
    for node, other in zip(nodes, reversed(nodes), strict=True):
        listen = other.sections["server"]["listen"][0]
        node.upstreams["docker.io"]["mirrors"] = [f"http://{listen}"]
    async with running_fleet(*nodes):
        image = registry.add_image(layers=[os.urandom(MIB)])
        # Without a guard they would ask each other until the timeouts of upstreams, 30 s.
        async with asyncio.timeout(20):
            await run_all(node.pull(image) for node in nodes)


async def test_the_cap_of_each_node_holds(tmp_path, registry, server):
    limit = 8 * MIB
    nodes = [
        FleetProgram(
            tmp_path / f"node{n}",
            registry,
            server,
            store={"max_size": str(limit), "min_free": "0B"},
        )
        for n in range(2)
    ]
    async with running_fleet(*nodes):
        digests = [registry.add_blob(os.urandom(2 * MIB)) for _ in range(8)]
        for digest in digests:
            for node in nodes:
                assert (await node.blob(digest)).digest == digest
                assert node.disk_usage() <= limit


async def test_the_503_of_a_load_balancer_is_not_waited_for(nodes, registry, server):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\n\r\nbusy")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as balancer:
        address = f"http://127.0.0.1:{balancer.sockets[0].getsockname()[1]}"
        keys, number = FleetKeys("pullcache"), node_id(address)
        digest = registry.add_blob(b"content")
        row = f'gone {{"address": "{address}", "instance": "gone"}}'
        await asyncio.to_thread(server.command, "HSET", keys.rows, number, row)
        await asyncio.to_thread(server.command, "SADD", keys.holders(Digest.parse(digest)), number)
        async with asyncio.timeout(10):
            assert (await nodes[0].blob(digest)).digest == digest
    assert await nodes[0].metric("pullcache_peer_failovers_total", reason="broken") == 1


async def hold(node: FleetProgram, digest: str, *, count: int = 4) -> None:
    """Have a node send a blob to as many others as it may, as it seems."""
    for _ in range(count):
        node.running._core.peer_transfers.begin(Digest.parse(digest))


async def test_a_node_that_sends_a_blob_to_its_children_sends_it_to_no_other(nodes, registry):
    digest = registry.add_blob(os.urandom(MIB))
    assert (await nodes[0].blob(digest)).digest == digest
    await settle(nodes[0])
    headers = {"Pullcache_Fleet": TOKEN, "Pullcache_Proven": "1"}
    path = f"/v2/library/app/blobs/{digest}?ns=docker.io"
    assert (await nodes[0].ask(path, **headers)).status == 200
    await hold(nodes[0], digest)
    refused = await nodes[0].ask(path, **headers)
    assert refused.status == 429
    assert "fleet.children" in refused.body.decode()
    # What one node has waited for long enough is sent, and clients are not limited.
    assert (await nodes[0].ask(path, Pullcache_Insist="1", **headers)).status == 200
    assert (await nodes[0].blob(digest)).digest == digest


@pytest.mark.parametrize(("full", "free"), [(0, 1), (1, 0)])
async def test_the_next_node_is_asked_if_one_sends_a_blob_to_its_children(
    nodes, registry, full, free
):
    digest = registry.add_blob(os.urandom(MIB))
    for node in nodes[:2]:
        assert (await node.blob(digest)).digest == digest
        await settle(node)
    before = await nodes[free].metric("pullcache_peer_bytes_total", direction="out")
    await hold(nodes[full], digest)
    assert (await nodes[2].blob(digest)).digest == digest
    after = await nodes[free].metric("pullcache_peer_bytes_total", direction="out")
    assert after - before == MIB


async def test_a_node_waits_for_the_one_that_has_the_blob_and_is_sent_it_in_the_end(
    nodes, registry
):
    digest = registry.add_blob(os.urandom(MIB))
    assert (await nodes[0].blob(digest)).digest == digest
    await settle(nodes[0])
    sent = blob_bytes(registry)
    await hold(nodes[0], digest)
    # After five seconds it is sent the blob all the same.
    assert (await nodes[1].blob(digest)).digest == digest
    assert blob_bytes(registry) - sent <= 1
    assert await nodes[1].metric("pullcache_peer_failovers_total") == 0
    assert await nodes[1].metric("pullcache_peer_requests_total", result="whole") == 1


async def test_a_node_with_peers_fetches_a_large_blob_from_its_beginning(nodes, registry):
    async def count_connections(least: int) -> int:
        """Return how many connections send a blob after some of it has arrived."""
        digest = registry.add_blob(os.urandom(24 * MIB))
        requests = f"GET /registry-v2/.*{digest[7:]}"
        registry.throttle(2 * MIB)
        async with asyncio.TaskGroup() as group:
            pull = group.create_task(nodes[0].blob(digest))
            await registry.until(
                lambda: registry.bytes_sent(requests) > MIB and registry.count(requests) >= least
            )
            count = int(registry.count(requests))
            registry.throttle(None)
        assert pull.result().digest == digest
        return count

    assert await count_connections(1) == 1
    for node in nodes[1:]:
        await node.stop()
    await nodes[0].until(lambda: not nodes[0].members)
    assert await count_connections(4) == 4
