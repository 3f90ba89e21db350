"""Docker Hub's own API for tests of real programs: the fake of the unit tests, in a thread."""

import asyncio
import threading

from tests.fakes.hub import FakeHub


class HubServer:
    """`FakeHub`, for tests that do not run in an event loop."""

    def __init__(self) -> None:
        self.hub = FakeHub()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return self.hub.url

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.hub.start(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.hub.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
