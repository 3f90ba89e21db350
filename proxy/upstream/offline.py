"""The switch that keeps every upstream from being asked, from one moment to the next.

It stands twice before the network: a question is refused before it begins (`exchange.py`), and as a
middleware of every session it ends what is under way, so that not a packet more is asked for.
"""

import asyncio
from weakref import WeakSet

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

from proxy.errors import OfflineError


class Offline:
    """Whether to be offline; true in a condition while it is. One for all upstreams."""

    def __init__(self, is_on: bool = False) -> None:
        self._is_on = is_on
        self._asking: set[asyncio.Timeout] = set()
        self._answering: WeakSet[ClientResponse] = WeakSet()

    def __bool__(self) -> bool:
        return self._is_on

    def switch(self, *, is_on: bool) -> None:
        """Go offline, which cuts what is under way, or go online again."""
        self._is_on = is_on
        if is_on:
            for asking in self._asking:
                if not asking.expired():
                    asking.reschedule(0.0)
            for response in list(self._answering):
                # Said to who reads it, so that nobody takes it for a failure and tries again.
                response.content.set_exception(_error())
                response.close()

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        """Send a request unless offline. Raises `OfflineError`, also if the switch is thrown meanwhile."""
        self.check()
        try:
            async with asyncio.timeout(None) as asking:
                self._asking.add(asking)
                try:
                    response = await handler(request)
                finally:
                    self._asking.discard(asking)
        except TimeoutError:
            self.check()
            raise
        if self._is_on:
            # Answered in the very turn of the loop in which the switch was thrown.
            response.close()
            raise _error()
        self._answering.add(response)
        return response

    def check(self) -> None:
        """Raise `OfflineError` while offline."""
        if self._is_on:
            raise _error()


def _error() -> OfflineError:
    return OfflineError("this cache is offline and does not have it; go online or preload it")
