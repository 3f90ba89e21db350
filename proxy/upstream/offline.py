"""The switch that stops all requests to upstreams at once.

It is checked before each request (`registry_client.py`), and as a middleware of every session it
aborts the requests and responses in progress.
"""

import asyncio
from weakref import WeakSet

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

from proxy.errors import OfflineError


class OfflineSwitch:
    """The offline state of the daemon, shared by all upstreams; truthy while offline."""

    def __init__(self, is_offline: bool = False) -> None:
        self._is_offline = is_offline
        self._request_timeouts: set[asyncio.Timeout] = set()
        self._open_responses: WeakSet[ClientResponse] = WeakSet()

    def __bool__(self) -> bool:
        return self._is_offline

    def set_offline(self, *, is_offline: bool) -> None:
        """Go offline, which aborts requests and responses in progress, or go online again."""
        self._is_offline = is_offline
        if is_offline:
            for timeout in self._request_timeouts:
                if not timeout.expired():
                    timeout.reschedule(0.0)
            for response in list(self._open_responses):
                # Set on the body too, so that its reader does not take the end for a failure to
                # retry.
                response.content.set_exception(_offline_error())
                response.close()

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        """Send a request; raise `OfflineError` if offline, or as soon as the switch is set."""
        self.check_online()
        try:
            async with asyncio.timeout(None) as timeout:
                self._request_timeouts.add(timeout)
                try:
                    response = await handler(request)
                finally:
                    self._request_timeouts.discard(timeout)
        except TimeoutError:
            self.check_online()
            raise
        if self._is_offline:
            # The response arrived in the same iteration of the loop as the switch.
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
