"""A fake Docker Hub: real servers on loopback, with faults on demand."""

import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tests.fakes.api import RegistryApi
from tests.fakes.faults import Fault, Rule
from tests.fakes.http_server import FakeServer, ReceivedRequest, RequestLog
from tests.fakes.startable import Startable


class FakeRegistry(Startable, RegistryApi):
    """Push to it with the methods of `Content`, use `url` as upstream, and inspect `requests`.

    These attributes may be changed at any time: `auth` (a token is needed), `cdn` (blobs are
    redirected), `redirect_heads` (HEADs of blobs too), `referrers` (or 404), `tags_page` (the
    largest page), `pull_limit` (None: no limit), `catalogue` (None: no search).
    """

    def __init__(
        self,
        *,
        auth: bool = True,
        cdn: bool = True,
        send_length: bool = True,
        accept_ranges: bool = True,
        referrers: bool = True,
        pull_limit: int | None = 100,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__()
        self.auth = auth
        self.cdn = cdn
        self.referrers = referrers
        self.pull_limit = pull_limit
        self.log = RequestLog()
        self.front = FakeServer("registry", self.answer, self.log)
        self.edge = FakeServer("cdn", self.answer_cdn, self.log)
        for wire in (self.front, self.edge):
            wire.send_length = send_length
            wire.accept_ranges = accept_ranges
            wire.tls = tls

    # Inspection.

    @property
    def url(self) -> str:
        """The URL to configure as upstream."""
        return self.front.url

    @property
    def cdn_url(self) -> str:
        """The URL of the CDN, from which blobs are served."""
        return self.edge.url

    @property
    def requests(self) -> list[ReceivedRequest]:
        """All requests so far, including those to the token service and the CDN."""
        return self.log.requests

    def seen(self, match: str = "") -> list[ReceivedRequest]:
        """Return the requests whose `METHOD target` matches the regular expression."""
        return self.log.seen(match)

    def count(self, match: str = "") -> int:
        """Return the number of matching requests."""
        return self.log.count(match)

    def bytes_sent(self, match: str = "") -> int:
        """Return the body bytes sent for matching requests."""
        return self.log.bytes_sent(match)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, asked at every request and every chunk, holds."""
        await self.log.until(condition)

    def body_of(self, digest: str) -> str:
        """Return a pattern for the GET that transfers a blob, from the CDN or the registry."""
        hexdigits = digest.partition(":")[2]
        return f"GET /registry-v2/.*{hexdigits}" if self.cdn else f"GET /v2/.*/blobs/.*{hexdigits}"

    # Faults.

    def fail(self, match: str, fault: Fault, *, times: int | None = 1) -> Rule:
        """Apply a fault to the next `times` matching requests (None: to all)."""
        rule = Rule(re.compile(match), fault, times)
        for wire in (self.front, self.edge):
            wire.rules.append(rule)
        return rule

    def heal(self) -> None:
        """Remove all faults."""
        for wire in (self.front, self.edge):
            wire.rules.clear()

    def throttle(self, rate: int | None) -> None:
        """Limit each connection to `rate` bytes per second."""
        self.front.rate = self.edge.rate = rate

    async def start(self) -> None:
        """Listen, on the same ports as before if it was stopped."""
        await self.front.start()
        await self.edge.start()

    async def stop(self) -> None:
        """Refuse connections, and close the existing ones."""
        await self.front.stop()
        await self.edge.stop()

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Be stopped during the block."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        if self.log.errors:
            raise ExceptionGroup("the fake registry is broken", self.log.errors)
