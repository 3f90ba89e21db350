"""The switch that keeps every upstream from being asked, from one moment to the next.

It stands twice before the network: a question is refused before it begins (`exchange.py`), and as a
middleware of every session it ends what is under way, so that not a packet more is asked for.
"""

import asyncio
from weakref import WeakSet

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

from proxy.errors import OfflineError


class OfflineSwitch:
    """Whether to be offline; true in a condition while it is. One for all upstreams."""

    def __init__(self, is_offline: bool = False) -> None:
        self._is_offline = is_offline
        self._request_timeouts: set[asyncio.Timeout] = set()
        self._open_responses: WeakSet[ClientResponse] = WeakSet()

    def __bool__(self) -> bool:
        return self._is_offline

    def set_offline(self, *, is_offline: bool) -> None:
        """Go offline, which cuts what is under way, or go online again."""
        self._is_offline = is_offline
        if is_offline:
            for asking in self._request_timeouts:
                if not asking.expired():
                    asking.reschedule(0.0)
            for response in list(self._open_responses):
                # Said to who reads it, so that nobody takes it for a failure and tries again.
                response.content.set_exception(_offline_error())
                response.close()

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        """Send a request unless offline. Raises `OfflineError`, also if the switch is thrown meanwhile."""
        self.check_online()
        try:
            async with asyncio.timeout(None) as asking:
                self._request_timeouts.add(asking)
                try:
                    response = await handler(request)
                finally:
                    self._request_timeouts.discard(asking)
        except TimeoutError:
            self.check_online()
            raise
        if self._is_offline:
            # Answered in the very turn of the loop in which the switch was thrown.
            response.close()
            raise _offline_error()
        self._open_responses.add(response)
        return response

    def check_online(self) -> None:
        """Raise `OfflineError` while offline."""
        if self._is_offline:
            raise _offline_error()


def _offline_error() -> OfflineError:
    return OfflineError("this cache is offline and does not have it; go online or preload it")
