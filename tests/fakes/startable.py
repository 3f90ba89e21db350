"""The base of all fake servers: context managers that run the server during the block."""

from abc import ABC, abstractmethod
from typing import Self


class Startable(ABC):
    """A server that is started and stopped, also by `async with`."""

    @abstractmethod
    async def start(self) -> None:
        """Listen, always on the same port."""

    @abstractmethod
    async def stop(self) -> None:
        """Stop listening, and close every connection."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()
