"""The webhook: posts what an operator should know to one URL, as CloudEvents 1.0 with an HMAC signature.

Events wait in a bounded queue, so that nothing waits for the receiver. While the daemon is offline
there are none.
"""

import asyncio
import hashlib
import hmac
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

import msgspec
from aiohttp import ClientError, ClientTimeout, DefaultResolver
from yarl import URL

from proxy.config import NotifySettings
from proxy.errors import ConfigError, OfflineError, ProxyError
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.upstream.network.egress import EgressGuard
from proxy.upstream.network.proxies import ProxySelector
from proxy.upstream.network.session import open_session
from proxy.upstream.offline import OfflineSwitch

EventType = Literal[
    "upstream.down",
    "upstream.up",
    "ratelimit.low",
    "store.pins_full",
    "blob.corrupt",
    "preload.failed",
    "policy.refused",
]

# Events that wait to be sent; beyond that new ones are dropped and counted.
MAX_QUEUED_EVENTS = 100
# Attempts to send an event, and seconds before the second one, doubled for each further one.
MAX_ATTEMPTS = 4
RETRY_DELAY = 2.0
# Seconds to connect, and for a whole request.
CONNECT_TIMEOUT = 5.0
REQUEST_TIMEOUT = 10.0
# Seconds that a shutdown waits for events.
DRAIN_TIMEOUT = 2.0
# The header with the signature, in the form that GitHub and WebSub (section 7.1) have established.
SIGNATURE_HEADER = "X-Hub-Signature-256"

log = get_logger(__name__)


class CloudEvent(msgspec.Struct, frozen=True):
    """An event in the JSON format of CloudEvents 1.0."""

    id: str
    source: str
    type: str
    time: str
    data: Mapping[str, object]
    subject: str
    specversion: str = "1.0"
    datacontenttype: str = "application/json"


class Webhook:
    """Sends events to `settings.url`; without one it does nothing. A reload replaces `settings`."""

    def __init__(
        self,
        settings: NotifySettings,
        offline: OfflineSwitch,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        self._offline = offline
        self._metrics = metrics
        self._clock = clock
        self._queue: asyncio.Queue[CloudEvent] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._source = f"/pullcache/{socket.gethostname()}"

    def notify(self, kind: EventType, subject: str, **data: object) -> None:
        """Queue an event about `subject`: the name of an upstream, an image or the store."""
        if not self.settings.url or self._offline:
            return
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
        event = CloudEvent(str(uuid.uuid4()), self._source, f"pullcache.{kind}", at, data, subject)
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._metrics.count_notification("dropped")

    async def run(self) -> None:
        """Send the events until cancelled, one after another."""
        while True:
            event = await self._queue.get()
            try:
                await self._send_with_retries(event)
            except (ProxyError, ClientError, OSError, TimeoutError, ValueError) as error:
                if not isinstance(error, OfflineError):
                    self._metrics.count_notification("failed")
                    log.warning(
                        "notification_failed", type=event.type, reason=str(error) or "timeout"
                    )
            except Exception:
                self._metrics.count_internal_error()
                log.exception("notification_crashed", type=event.type)
            else:
                self._metrics.count_notification("sent")
            finally:
                self._queue.task_done()

    async def drain(self) -> None:
        """Wait until all events are sent, for a moment: what a command reports must not be lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await self._queue.join()

    async def _send_with_retries(self, event: CloudEvent) -> None:
        for attempt in range(1, MAX_ATTEMPTS):
            try:
                return await self._send(event)
            except (ClientError, OSError, TimeoutError):
                await asyncio.sleep(RETRY_DELAY * 2 ** (attempt - 1))
        return await self._send(event)

    async def _send(self, event: CloudEvent) -> None:
        """Post an event. Raises `ConfigError`, `OfflineError`, and what aiohttp raises."""
        settings = self.settings
        url, body = URL(settings.url), msgspec.json.encode(event)
        key = await asyncio.to_thread(settings.read_key)
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
        if key:
            signature = hmac.new(key, body, hashlib.sha256).hexdigest()
            headers[SIGNATURE_HEADER] = f"sha256={signature}"
        proxies = ProxySelector(os.environ)
        tls = await asyncio.to_thread(ssl.create_default_context)
        # Events are rare, so that a session for each is cheap and a reload needs to replace nothing.
        guard = EgressGuard(url, DefaultResolver(), proxies)
        async with (
            open_session(
                guard, proxies, self._offline, tls=tls, connect_timeout=CONNECT_TIMEOUT
            ) as session,
            session.post(
                url,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=ClientTimeout(total=REQUEST_TIMEOUT),
            ) as response,
        ):
            if response.status >= 500 or response.status == 429:
                raise ClientError(f"{url.host} responded with status {response.status}")
            if response.status >= 300:
                raise ConfigError(
                    f"{url.host} responded with status {response.status}; check notify.url and "
                    "notify.key_file"
                )
