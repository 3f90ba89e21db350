"""How long a client waits for what upstream alone can say, and others for a time of day."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from proxy.errors import UpstreamTimeoutError

# Seconds from a request to the headers of its answer, or its error, whatever upstream does. Clients
# give up on a mirror that is silent for 30 s (containerd 2.3, Docker 29).
DEADLINE = 14.0
# A tag's refresh ends so much earlier, for the sake of its stale copy.
MARGIN = 1.0
# A clock is looked at so often, in seconds.
TICK = 0.5


@asynccontextmanager
async def until(deadline: float, upstream: str) -> AsyncIterator[None]:
    """Let the block wait until this time of the loop, or raise `UpstreamTimeoutError`.

    What it waits for goes on if it has an owner of its own, as single flights and downloads have.
    """
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise UpstreamTimeoutError(
            f"{upstream} has not answered for {DEADLINE:.0f} s; try again in a moment"
        ) from None


async def reached(moment: float, clock: Callable[[], float]) -> None:
    """Wait until `clock`, Unix time, says `moment`: through a sleep of the machine, and however it is set."""
    while (left := moment - clock()) > 0:  # noqa: ASYNC110 (clocks tell nobody when they are set)
        await asyncio.sleep(min(left, TICK))
