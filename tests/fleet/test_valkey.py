"""The directory in a real server: members, places, tags, limits, leases."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack, suppress
from typing import Any

from proxy.fleet.directory import PeerCopy
from proxy.fleet.keys import FleetKeys
from proxy.fleet.server import MAX_QUESTIONS
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from tests.fleet.conftest import PATIENCE, locate_until, wait_until

BLOB = Digest.from_content(b"blob")
OTHER = Digest.from_content(b"other")
HUB = "docker.io"
NGINX, LATEST = Repository("docker.io", "library/nginx"), Tag("latest")


def port(found: PeerCopy | None) -> int:
    return int(found.member.address.rpartition(":")[2]) if found else 0


async def test_nodes_know_each_other(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    await nodes.until(lambda: len(one.members) == 1 and len(two.members) == 1)
    assert one.members[0].address == "http://127.0.0.1:2"
    assert not one.is_blind
    await two.close()
    await nodes.until(lambda: not one.members)


async def test_the_first_node_fetches_and_the_next_one_asks_it(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    async with one.downloading(HUB, BLOB) as first, two.downloading(HUB, BLOB) as second:
        assert await first.locate() is None
        found = await second.locate()
        assert port(found) == 1
        assert not found.is_whole
        # To ask again changes nothing.
        assert await first.locate() is None


async def test_a_node_that_has_the_blob_is_asked_for_it(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    async with one.downloading(HUB, BLOB) as first:
        assert await first.locate() is None
    async with two.downloading("ghcr.io", BLOB) as second:
        found = await second.locate()
        assert port(found) == 1
        assert found.is_whole
    # It has a copy itself now, and is not sent to itself.
    async with one.downloading(HUB, BLOB) as again:
        assert port(await again.locate()) == 2


async def test_a_node_knows_whether_another_one_has_a_blob(nodes, server):
    one, two = await nodes.start(1), await nodes.start(2)
    async with one.downloading(HUB, BLOB):
        assert not await two.is_held(BLOB)
    assert await two.is_held(BLOB)
    assert not await one.is_held(BLOB)
    server.kill()
    assert not await two.is_held(BLOB)


async def test_a_failed_download_leaves_its_place_to_the_next_node(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    async with two.downloading(HUB, BLOB) as second:
        with suppress(ConnectionResetError):
            async with one.downloading(HUB, BLOB) as first:
                assert await first.locate() is None
                assert port(await second.locate()) == 1
                raise ConnectionResetError
        assert await second.locate() is None


async def test_nodes_form_a_tree(nodes):
    directories = [await nodes.start(number, children=2) for number in range(1, 9)]
    parents = []
    async with AsyncExitStack() as stack:
        for node in directories:
            download = await stack.enter_async_context(node.downloading(HUB, BLOB))
            parents.append(port(await download.locate()))
    assert parents == [0, 1, 1, 2, 2, 3, 3, 4]


async def test_a_holder_feeds_no_more_than_its_children(nodes):
    directories = [await nodes.start(number, children=2) for number in range(1, 7)]
    async with directories[0].downloading(HUB, BLOB):
        pass
    parents = []
    async with AsyncExitStack() as stack:
        for node in directories[1:]:
            download = await stack.enter_async_context(node.downloading(HUB, BLOB))
            parents.append(port(await download.locate()))
    assert parents == [1, 1, 2, 2, 3]


async def test_a_copy_that_failed_is_not_returned_again(nodes):
    one, two, three = [await nodes.start(number) for number in (1, 2, 3)]
    async with (
        one.downloading(HUB, BLOB) as first,
        two.downloading(HUB, BLOB) as second,
        three.downloading(HUB, BLOB) as third,
    ):
        assert await first.locate() is None
        assert port(await second.locate()) == 1
        for number in (1, 2):
            found = await third.locate()
            assert port(found) == number
            await third.report(found.member, "stall")
        assert await third.locate() is None


async def test_wrong_bytes_bar_a_member_for_later_downloads_too(nodes):
    one, two, three = [await nodes.start(number) for number in (1, 2, 3)]
    async with one.downloading(HUB, BLOB):
        pass
    async with two.downloading(HUB, BLOB) as second:
        found = await second.locate()
        assert port(found) == 1
        await second.report(found.member, "wrong_bytes")
        assert await second.locate() is None
        one.add_holdings([BLOB, OTHER])
        async with three.downloading(HUB, OTHER) as other:
            found = await locate_until(other)
            assert port(found) == 1
    async with two.downloading("ghcr.io", BLOB) as again:
        assert await again.locate() is None


async def test_a_member_without_the_blob_is_no_longer_a_holder(nodes):
    one, two, three = [await nodes.start(number) for number in (1, 2, 3)]
    async with one.downloading(HUB, BLOB):
        pass
    async with two.downloading(HUB, BLOB) as second:
        await second.report((await second.locate()).member, "absent")
        async with three.downloading(HUB, BLOB) as third:
            assert port(await third.locate()) == 2


async def test_a_member_that_cannot_be_reached_is_not_asked_for_other_blobs(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    for blob in (BLOB, OTHER):
        async with one.downloading(HUB, blob):
            pass
    async with two.downloading(HUB, BLOB) as second:
        await second.report((await second.locate()).member, "connect")
    async with two.downloading(HUB, OTHER) as second:
        assert await second.locate() is None


async def test_a_node_announces_what_its_store_has(nodes):
    await nodes.start(1, stored=lambda: [Digest.from_content(bytes([n])) for n in range(200)])
    two = await nodes.start(2)
    for number in (0, 99, 199):
        async with two.downloading(HUB, Digest.from_content(bytes([number]))) as download:
            found = await locate_until(download)
            assert found.is_whole


async def test_removed_blobs_are_no_longer_found(nodes):
    one, two = await nodes.start(1, stored=lambda: [BLOB]), await nodes.start(2)
    async with two.downloading(HUB, BLOB) as download:
        await locate_until(download)
        one.remove_holdings([BLOB])
        await locate_until(download, lambda found: found is None)


async def test_a_frozen_node_is_passed_over_and_keeps_its_holdings(nodes):
    one, two = await nodes.start(1), await nodes.start(2, heartbeat=1.0)
    async with one.downloading(HUB, OTHER):
        pass
    async with one.downloading(HUB, BLOB) as first, two.downloading(HUB, BLOB) as second:
        await first.locate()
        found = await second.locate()
        while port(found) != 1:  # three seconds have passed
            await one.join()
            await first.locate()
            found = await second.locate()
        # Node 1 does not report for longer than the heartbeats of node 2 allow.
        await wait_until(lambda: not two.members, two)
        assert await second.locate() is None
    async with two.downloading(HUB, OTHER) as second:
        assert await second.locate() is None
        found = None
        while port(found) != 1:
            await wait_until(lambda: len(two.members) == 1, one, two)
            found = await second.locate()


async def test_one_node_asks_upstream_for_a_tag(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    assert await one.get_tag(NGINX, LATEST) is None
    waiting = asyncio.Event()

    async def look() -> Any:
        waiting.set()
        return await two.get_tag(NGINX, LATEST)

    async with asyncio.TaskGroup() as group:
        looking = group.create_task(look())
        await waiting.wait()
        await one.set_tag(NGINX, LATEST, BLOB, ttl=60, keep=60)
    found = looking.result()
    assert found.digest == BLOB
    assert found.is_fresh
    assert found.age < 60


async def test_a_tag_that_upstream_does_not_have_is_known(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    await one.get_tag(NGINX, LATEST)
    await one.set_tag(NGINX, LATEST, None, ttl=60, keep=0)
    found = await two.get_tag(NGINX, LATEST)
    assert found.digest is None
    assert found.is_fresh


async def test_a_stale_tag_is_for_one_node_to_ask_about(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    await one.set_tag(NGINX, LATEST, BLOB, ttl=0, keep=60)
    found = await one.get_tag(NGINX, LATEST)
    assert found.digest == BLOB
    assert not found.is_fresh
    await one.release_tag(NGINX, LATEST)
    assert not (await two.get_tag(NGINX, LATEST)).is_fresh


async def test_a_limit_is_known_to_all_and_never_shortened(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    assert await two.limited_for(HUB, "pulls") == 0
    await one.limit(HUB, "pulls", 600)
    await two.limit(HUB, "pulls", 1)
    assert 500 < await two.limited_for(HUB, "pulls") <= 600
    assert await two.limited_for(HUB, "tags") == 0


async def test_one_node_does_a_job(nodes):
    one, two = await nodes.start(1), await nodes.start(2)
    async with one.lead("preload", 60) as first, two.lead("preload", 60) as second:
        assert first
        assert not second
    async with two.lead("preload", 60) as second, two.lead("other", 60) as other:
        assert not second
        assert other


async def test_a_killed_server_blinds_and_an_empty_one_is_filled_again(nodes):
    one, two = await nodes.start(1, stored=lambda: [BLOB]), await nodes.start(2)
    async with one.downloading(HUB, OTHER) as first:
        assert await first.locate() is None
        nodes.server.kill()
        async with two.downloading(HUB, OTHER) as second:
            assert await second.locate() is None
            assert two.is_blind
            assert await two.get_tag(NGINX, LATEST) is None
            assert await two.limited_for(HUB, "pulls") == 0
            async with two.lead("preload", 60) as is_leader:
                assert is_leader
        await nodes.until(lambda: one.is_blind)
        nodes.server.start()
        await nodes.until(lambda: not one.is_blind and not two.is_blind)
        # The first node keeps its place.
        async with two.downloading(HUB, BLOB) as second:
            found = await locate_until(second)
            assert found.is_whole
        await nodes.until(lambda: len(two.members) == 1)
        assert await first.locate() is not None  # node 2 has it: it fetched alone


async def test_a_frozen_server_blinds(nodes):
    one = await nodes.start(1, answer_timeout=0.2)
    await nodes.until(lambda: not one.is_blind)
    nodes.server.signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(PATIENCE), one.downloading(HUB, BLOB) as download:
            assert await download.locate() is None
        assert one.is_blind
        assert "did not answer within 0.2 s (fleet.answer_timeout)" in one.problem
    finally:
        nodes.server.signal(signal.SIGCONT)
    await nodes.until(lambda: not one.is_blind)


async def test_waiting_for_own_questions_does_not_blind(nodes):
    one = await nodes.start(1, answer_timeout=2.0)
    await nodes.until(lambda: not one.is_blind)
    async with AsyncExitStack() as stack:
        for _ in range(MAX_QUESTIONS):
            await stack.enter_async_context(one._server._turns)
        waiting = asyncio.get_running_loop().create_task(one.is_held(BLOB))
        # A heartbeat does not wait.
        await one.join()
        await asyncio.sleep(2.5)  # longer than the server may take
    assert not await waiting
    assert not one.is_blind


async def test_a_busy_event_loop_does_not_blind(nodes):
    one = await nodes.start(1, answer_timeout=1.0)
    await nodes.until(lambda: not one.is_blind)
    for turns in (2, 4, 8):
        asking = asyncio.get_running_loop().create_task(one.limited_for(HUB, "pulls"))
        for _ in range(turns):
            await asyncio.sleep(0)
        # The question is sent, and the loop does not read the answer.
        time.sleep(1.2)  # noqa: ASYNC251
        await asking
        assert not one.is_blind


async def test_two_nodes_with_one_address_are_not_both_members(nodes):
    one, other, two = await nodes.start(1), await nodes.start(1), await nodes.start(2)
    assert not one.is_blind
    assert other.is_blind
    await nodes.until(lambda: len(two.members) == 1)
    await one.close()
    await nodes.until(lambda: not other.is_blind)


async def test_nodes_of_two_protocols_are_two_fleets(nodes):
    old, new = await nodes.start(1), await nodes.start(2, protocol=2)
    async with old.downloading(HUB, BLOB):
        pass
    async with new.downloading(HUB, BLOB) as download:
        assert await download.locate() is None
    assert not old.members
    assert not new.members


async def test_rows_that_no_node_wrote_are_left_out(nodes, server):
    one = await nodes.start(1)
    address = "http://127.0.0.1:9"
    rows = (
        "garbage",
        "i {",
        'i {"address": 5, "instance": "i"}',
        'i {"address": "file:///etc/passwd", "instance": "i"}',
        # The row of one node under the id of another.
        f'i {{"address": "{address}", "instance": "i"}}',
        "\udcff\udcfe",
    )
    for number, row in enumerate(rows):
        server.command("HSET", "{test:1}:rows", f"row-{number}", row)
    await nodes.start(2)
    await nodes.until(lambda: len(one.members) == 1)
    assert one.members[0].address == "http://127.0.0.1:2"
    assert not one.is_blind


async def test_what_no_node_wrote_of_a_tag_is_not_known(nodes, server):
    one = await nodes.start(1)
    key = FleetKeys("test").tag(NGINX, LATEST).tag
    server.command("HSET", key, "digest", "garbage", "at", "1", "until", "99999999999999")
    assert await one.get_tag(NGINX, LATEST) is None
    assert not one.is_blind
