"""Live figures: the block `live` of a page, sent as server-sent events whenever it has changed."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from aiohttp.web import BaseRequest, StreamResponse

from proxy.errors import ProxyError, TooManyRequestsError
from proxy.server.pages.page import Page, PageRequest
from proxy.server.pages.templating import PageRenderer

# Seconds between two looks at the figures.
LIVE_INTERVAL = 2.0
# Browsers that get live figures at a time.
MAX_LIVE_STREAMS = 32
# Those of one session, or of one address without a login: the others are left for other people.
MAX_CLIENT_STREAMS = 8
# After this many looks without a change, a comment shows whether the browser is still there.
_QUIET_LOOKS = 8


async def render(
    renderer: PageRenderer, page: Page, request: PageRequest, context: Mapping[str, object]
) -> str:
    """Return the block of a page as it is now."""
    model = await page.handler(request)
    return await renderer.render(page.template, {**context, **model, "layout": "live.html"})


class LiveStreams:
    """The streams that are open."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[object], str] = {}

    def close(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()

    async def send(
        self,
        request: BaseRequest,
        client: str,
        headers: Mapping[str, str],
        render: Callable[[], Awaitable[str]],
        is_still_valid: Callable[[], bool],
    ) -> StreamResponse:
        """Send what `render` returns whenever it differs, until the session ends or the browser goes.

        `client` is the session, or the address of a browser without a login. Raises
        `TooManyRequestsError`.
        """
        task = asyncio.current_task()
        assert task is not None
        of_client = sum(one == client for one in self._tasks.values())
        if len(self._tasks) >= MAX_LIVE_STREAMS or of_client >= MAX_CLIENT_STREAMS:
            raise TooManyRequestsError("too many pages with live figures are open; reload by hand")
        self._tasks[task] = client
        try:
            # An error of the first look still becomes a status, which ends the browser's attempts.
            text = await render()
            response = StreamResponse(headers=headers)
            await response.prepare(request)
            shown, quiet = "", 0
            while is_still_valid():
                quiet += 1
                if text != shown:
                    await response.write(b"data: " + msgspec.json.encode(text) + b"\n\n")
                    shown, quiet = text, 0
                elif quiet >= _QUIET_LOOKS:
                    await response.write(b":\n\n")
                    quiet = 0
                await asyncio.sleep(LIVE_INTERVAL)
                try:
                    text = await render()
                except ProxyError as error:
                    raise ConnectionError(str(error)) from error  # browsers connect anew
            await response.write(b"event: end\ndata: \n\n")
            await response.write_eof()
        finally:
            del self._tasks[task]
        return response
