"""A registry that plays Docker Hub: real servers on loopback, faults on request."""

import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from tests.fakes.api import RegistryApi
from tests.fakes.faults import Fault, Rule
from tests.fakes.wire import Log, Seen, Wire


class FakeRegistry(RegistryApi):
    """Push with the methods of `Content`, point the program at `url`, look at `requests`.

    Switches may be turned at any time: `auth` (token needed), `cdn` (blobs by redirect),
    `redirect_heads` (HEAD of a blob too), `referrers` (or 404), `tags_page` (largest page),
    `pull_limit` (None: no limit headers), `catalogue` (None: no search), `send_length`,
    `accept_ranges`, `rate`.
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
        self.log = Log()
        self.front = Wire("registry", self.answer, self.log)
        self.edge = Wire("cdn", self.answer_cdn, self.log)
        for wire in (self.front, self.edge):
            wire.send_length = send_length
            wire.accept_ranges = accept_ranges
            wire.tls = tls

    # What tests look at.

    @property
    def url(self) -> str:
        """The address to configure as upstream."""
        return self.front.url

    @property
    def cdn_url(self) -> str:
        """The address that blobs come from."""
        return self.edge.url

    @property
    def requests(self) -> list[Seen]:
        """Everything asked so far, token service and CDN included."""
        return self.log.requests

    def seen(self, match: str = "") -> list[Seen]:
        """Return the requests whose `METHOD target` holds the regular expression `match`."""
        return self.log.seen(match)

    def count(self, match: str = "") -> int:
        """Return how many requests `match`."""
        return self.log.count(match)

    def bytes_sent(self, match: str = "") -> int:
        """Return how many bytes of bodies went out to requests that `match`."""
        return self.log.bytes_sent(match)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, asked at every request and every chunk, holds."""
        await self.log.until(condition)

    def body_of(self, digest: str) -> str:
        """Return the match for the GET that carries a blob's bytes, wherever they come from."""
        hexdigits = digest.partition(":")[2]
        return f"GET /registry-v2/.*{hexdigits}" if self.cdn else f"GET /v2/.*/blobs/.*{hexdigits}"

    # What tests do to it.

    def fail(self, match: str, fault: Fault, *, times: int | None = 1) -> Rule:
        """Spoil the next `times` answers (None: all) to requests that `match`."""
        rule = Rule(re.compile(match), fault, times)
        for wire in (self.front, self.edge):
            wire.rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget all faults."""
        for wire in (self.front, self.edge):
            wire.rules.clear()

    def throttle(self, rate: int | None) -> None:
        """Send at most `rate` bytes a second on each connection."""
        self.front.rate = self.edge.rate = rate

    async def start(self) -> None:
        """Listen, on the same ports as before."""
        await self.front.start()
        await self.edge.start()

    async def stop(self) -> None:
        """Be down: refuse connections and drop the ones there are."""
        await self.front.stop()
        await self.edge.stop()

    @asynccontextmanager
    async def down(self) -> AsyncIterator[None]:
        """Be down for the length of a block."""
        await self.stop()
        try:
            yield
        finally:
            await self.start()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()
        if self.log.errors:
            raise ExceptionGroup("the fake registry is broken", self.log.errors)
