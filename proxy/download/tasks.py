"""Running several awaitables to completion, or none of them."""

import asyncio
from collections.abc import Awaitable
from contextlib import AsyncExitStack

from proxy.concurrency import background


async def run_all(*works: Awaitable[None]) -> None:
    """Run all `works` to completion; the first error cancels the others and is raised."""
    async with AsyncExitStack() as stack:
        pending = {await stack.enter_async_context(background(work)) for work in works}
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
