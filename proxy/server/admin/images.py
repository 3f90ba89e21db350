"""`/api/v1/images`: what is in the store, as images."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec

from proxy.images.check import Check, Checker, Wanted
from proxy.images.inspect import Detail, Inspector
from proxy.images.manage import Image, Images, Removed
from proxy.server.admin.api import Call, Input, Route


class Filter(Input, frozen=True):
    """Which images: a part of their names, or a glob."""

    filter: str = ""


class Named(Input, frozen=True):
    """One image."""

    image: str


class Several(Input, frozen=True):
    """Some images."""

    images: list[str]


class Removal(Several, frozen=True):
    """What is to go. `force` takes pinned images too."""

    dry_run: bool = False
    force: bool = False


class Checklist(Input, frozen=True):
    """What is to be checked."""

    images: list[Wanted]


class Pinned(msgspec.Struct, frozen=True):
    """The images whose pin was set, or taken away."""

    images: list[str]


@dataclass(frozen=True, slots=True)
class Operations:
    """What these routes work with."""

    images: Images
    checker: Checker
    inspector: Inspector

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/images", self.find),
            Route("GET", "/api/v1/images/inspect", self.inspect),
            Route("POST", "/api/v1/images/check", self.check),
            Route("POST", "/api/v1/images/remove", self.remove),
            Route("POST", "/api/v1/images/pin", self.pin),
            Route("POST", "/api/v1/images/unpin", self.unpin),
        ]

    def find(self, call: Call) -> AsyncGenerator[Image, None]:
        """List images."""
        return self.images.find(call.query(Filter).filter)

    async def inspect(self, call: Call) -> Detail:
        """Look closely at one."""
        return await self.inspector.inspect(call.query(Named).image)

    async def check(self, call: Call) -> AsyncGenerator[Check, None]:
        """Say what could be pulled with the network unplugged."""
        wanted = await call.document(Checklist)
        async for check in self.checker.check(wanted.images):
            yield check

    async def remove(self, call: Call) -> Removed:
        """Remove images, or say what that would free."""
        wanted = await call.document(Removal)
        return await self.images.remove(wanted.images, dry_run=wanted.dry_run, force=wanted.force)

    async def pin(self, call: Call) -> Pinned:
        """Keep images from being evicted."""
        return Pinned(await self.images.pin((await call.document(Several)).images))

    async def unpin(self, call: Call) -> Pinned:
        """Let images be evicted again."""
        return Pinned(await self.images.unpin((await call.document(Several)).images))
