"""The webhook: which events are posted, signed, tried again, dropped; and that nothing waits for them."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from proxy.cli.api_client import AdminClient
from proxy.config import load
from proxy.errors import ConfigError
from proxy.upstream import webhook
from tests.fakes.faults import Fault
from tests.support.admin_api import APP
from tests.support.commands import run, run_on
from tests.support.program import Program

KEY = b"a key of the operator"


class Receiver:
    """A server that takes events, and responds with the statuses of `statuses` first."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Any] = []
        self.statuses: list[int] = []
        self.url = ""
        self._arrived = asyncio.Condition()

    async def take(self, request: web.Request) -> web.Response:
        status = self.statuses.pop(0) if self.statuses else 204
        async with self._arrived:
            self.bodies.append(await request.read())
            self.headers.append(request.headers)
            self._arrived.notify_all()
        return web.Response(status=status)

    async def wait(self, count: int) -> list[dict[str, Any]]:
        """Return the events once there are `count`."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.bodies) >= count)
        return self.events

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for body in self.bodies]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    application = web.Application()
    application.router.add_post("/hook", receiver.take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@pytest.fixture
async def receiver():
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def notifying(receiver, make_program, tmp_path, monkeypatch):
    """Start a program that posts to the receiver, and compares states a hundred times a second."""
    monkeypatch.setattr("proxy.app.FLUSH_INTERVAL", 0.01)
    monkeypatch.setattr(webhook, "RETRY_DELAY", 0.01)
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY + b"\n")

    async def start(**sections: Any) -> Program:
        program: Program = await make_program(
            notify={"url": receiver.url, "key_file": str(key_file)}, **sections
        )
        return program

    return start


def notify(program: Program, number: int = 0) -> None:
    program.running._core.webhook.notify("store.pins_full", "store", pinned=number, limit=10)


async def test_an_event_is_a_signed_cloudevent(receiver, notifying):
    program = await notifying()
    notify(program, 9)
    (event,) = await receiver.wait(1)
    assert event.pop("id")
    assert event.pop("source").startswith("/pullcache/")
    assert event == {
        "specversion": "1.0",
        "type": "pullcache.store.pins_full",
        "time": "2023-11-14T22:13:20Z",
        "subject": "store",
        "datacontenttype": "application/json",
        "data": {"pinned": 9, "limit": 10},
    }
    headers = receiver.headers[0]
    assert headers["Content-Type"] == "application/cloudevents+json; charset=utf-8"
    digest = hmac.new(KEY, receiver.bodies[0], hashlib.sha256).hexdigest()
    assert headers["X-Hub-Signature-256"] == f"sha256={digest}"


async def test_without_a_key_events_are_not_signed(receiver, make_program):
    program = await make_program(notify={"url": receiver.url})
    notify(program)
    await receiver.wait(1)
    assert "X-Hub-Signature-256" not in receiver.headers[0]


async def test_an_upstream_that_goes_down_and_up_again_is_reported_once_each(
    registry, receiver, notifying
):
    program = await notifying(fetch={"attempts": 1})
    async with registry.down(), asyncio.timeout(20):
        while not receiver.bodies:
            await program.manifest("library/app")
        down = (await receiver.wait(1))[0]
    await program.wait_for_upstream()
    up = (await receiver.wait(2))[1]
    assert (down["type"], down["subject"]) == ("pullcache.upstream.down", "docker.io")
    assert down["data"]["reason"]
    assert (up["type"], up["subject"], up["data"]) == ("pullcache.upstream.up", "docker.io", {})
    assert len(receiver.bodies) == 2


async def test_few_pulls_left_are_reported_once(registry, receiver, notifying):
    registry.pull_limit = 3
    program = await notifying()
    for number in range(3):
        await program.manifest(registry.add_image(f"me/{number}"))
    (event,) = await receiver.wait(1)
    assert event["type"] == "pullcache.ratelimit.low"
    assert event["data"]["limit"] == 3
    notify(program)
    assert [one["type"] for one in await receiver.wait(2)][1:] == ["pullcache.store.pins_full"]


async def test_pins_that_fill_the_store_are_reported(registry, receiver, notifying):
    program = await notifying(store={"max_size": "10MB"})
    image = registry.add_image(layers=[bytes(9_050_000)])
    api = AdminClient(program.root)
    await asyncio.to_thread(api.post, "/api/v1/images/pin", {"images": ["app"]})
    await program.pull(image)
    await program.wait_for_downloads()
    (event,) = await receiver.wait(1)
    assert event["type"] == "pullcache.store.pins_full"
    assert event["data"]["pinned"] > 9_000_000


async def test_a_damaged_blob_is_reported_with_its_image(registry, receiver, notifying):
    program = await notifying()
    image = registry.add_image(layers=[b"x" * 10_000])
    await program.pull(image)
    await program.wait_for_downloads()
    (program.root / "blobs" / "sha256" / image.layers[0].partition(":")[2]).unlink()
    await program.blob(image.layers[0])
    await program.running._core.trail.write_evictions()
    (event,) = await receiver.wait(1)
    assert event["type"] == "pullcache.blob.corrupt"
    assert event["data"]["images"] == ["docker.io/library/app:latest"]


async def test_a_scheduled_preload_that_failed_is_reported(receiver, notifying):
    await notifying(preload=[{"images": ["gone"]}])
    (event,) = await receiver.wait(1)
    assert (event["type"], event["subject"]) == ("pullcache.preload.failed", "schedule preload[1]")
    assert event["data"]["images"] == ["docker.io/library/gone:latest"]


async def test_a_refusal_of_a_policy_is_reported(registry, receiver, notifying):
    program = await notifying(
        policy=[{"images": ["docker.io/*"], "mode": "enforce", "deny_tags": ["latest"]}]
    )
    answer = await program.manifest(registry.add_image())
    assert answer.status == 403
    (event,) = await receiver.wait(1)
    assert (event["type"], event["subject"]) == (
        "pullcache.policy.refused",
        f"docker.io/{APP}:latest",
    )
    assert (event["data"]["decision"], event["data"]["policy"]) == ("deny", 1)


async def test_a_receiver_that_fails_is_tried_again(receiver, notifying):
    receiver.statuses = [500, 503, 429]
    program = await notifying()
    notify(program)
    events = await receiver.wait(4)
    assert len({event["id"] for event in events}) == 1
    async with asyncio.timeout(10):
        while await program.metric("pullcache_notifications_total", result="sent") != 1:
            pass


async def test_an_event_that_is_refused_is_not_sent_again(receiver, notifying):
    receiver.statuses = [401]
    program = await notifying()
    notify(program, 1)
    notify(program, 2)
    assert [event["data"]["pinned"] for event in await receiver.wait(2)] == [1, 2]
    assert await program.metric("pullcache_notifications_total", result="failed") == 1


async def test_a_redirect_is_not_followed(receiver, notifying):
    receiver.statuses = [302]
    program = await notifying()
    notify(program, 1)
    notify(program, 2)
    await receiver.wait(2)
    assert await program.metric("pullcache_notifications_total", result="failed") == 1


async def test_a_full_queue_drops_events_and_blocks_nothing(receiver, notifying, monkeypatch):
    program = await notifying()
    for number in range(webhook.MAX_QUEUED_EVENTS + 3):
        notify(program, number)
    await receiver.wait(webhook.MAX_QUEUED_EVENTS)
    assert await program.metric("pullcache_notifications_total", result="dropped") == 3


async def test_nothing_is_sent_or_kept_while_offline(receiver, notifying):
    program = await notifying(offline=True)
    notify(program, 1)
    program.running._core.offline.set_offline(is_offline=False)
    notify(program, 2)
    assert [event["data"]["pinned"] for event in await receiver.wait(1)] == [2]


async def test_a_reload_changes_the_receiver(receiver, notifying):
    program = await notifying()
    async with receiving() as other:
        assert await program.reload(notify={"url": other.url})
        notify(program)
        await other.wait(1)
    assert receiver.bodies == []


async def test_a_missing_key_is_a_failure_with_the_name_of_the_file(receiver, make_program, capfd):
    program = await make_program(notify={"url": receiver.url, "key_file": "/nowhere/key"})
    notify(program)
    async with asyncio.timeout(10):
        while await program.metric("pullcache_notifications_total", result="failed") != 1:
            pass
    assert receiver.bodies == []


async def test_a_key_without_a_url_is_a_mistake():
    with pytest.raises(ConfigError, match="url is not"):
        load(None, {}, {"notify": {"key_file": "key"}})


async def test_a_webhook_is_no_request_to_an_upstream(registry, receiver, notifying):
    registry.fail(".*", Fault(status=500), times=None)
    program = await notifying()
    notify(program)
    await receiver.wait(1)
    assert registry.requests == []


async def test_an_event_at_the_end_is_still_sent(receiver, notifying):
    program = await notifying()
    notify(program, 7)
    await program.stop()
    assert [event["data"]["pinned"] for event in receiver.events] == [7]


async def test_a_receiver_that_is_gone_delays_the_end_by_a_moment_only(notifying, monkeypatch):
    monkeypatch.setattr(webhook, "DRAIN_TIMEOUT", 0.05)
    monkeypatch.setattr(webhook, "RETRY_DELAY", 60.0)
    program = await notifying()
    program.running._core.webhook.settings = load(
        None, {}, {"notify": {"url": "http://127.0.0.1:1/"}}
    ).notify
    notify(program)
    await program.stop()
    assert not program.is_running


async def test_a_command_without_a_daemon_reports_what_fails_and_no_states(
    registry, receiver, make_program, tmp_path
):
    program = await make_program(store={"max_size": "10MB"})
    registry.add_image(layers=[bytes(9_050_000)])
    done = await run_on(program, "preload", "--pin", "app")
    assert done.exit_code == 0, done.output
    await program.stop()
    file = tmp_path / "pullcache.toml"
    file.write_text(
        f'[store]\nmax_size = "10MB"\n[upstreams."docker.io"]\nurl = "{registry.url}"\n'
        f'[notify]\nurl = "{receiver.url}"\n'
    )
    commands = (["images"], ["preload", "gone"])
    for command in commands:
        await asyncio.to_thread(run, *command, "-c", file, "--store", program.root)
    (event,) = await receiver.wait(1)
    assert event["type"] == "pullcache.preload.failed"
    assert event["data"]["actor"].startswith("uid ")
