"""`/api/v1/pages/link`: an address at which this machine's browsers find the pages, with a login."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from proxy.errors import NotFoundError
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import AdminRequest, Route
from proxy.server.pages.sessions import LOGIN_CODE_LIFETIME, SessionStore


class PageAddress(NamedTuple):
    """Where pages are served: `host:port` on loopback, and whether they need a login there."""

    address: str
    needs_login: bool


class PageLink(msgspec.Struct, frozen=True):
    """The address of the pages; it logs in once, within `seconds`, which is 0 if no login is needed."""

    url: str
    seconds: int


class PageLinks:
    """Makes links to the pages. `find_address` opens a port on loopback if there is none."""

    def __init__(self, sessions: SessionStore) -> None:
        self.sessions = sessions
        self.find_address: Callable[[], Awaitable[PageAddress]] | None = None

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("POST", "/api/v1/pages/link", self.make_link)]

    async def make_link(self, request: AdminRequest) -> PageLink:
        """Return a link to the pages, for one login. Raises `NotFoundError` if there are none."""
        if self.find_address is None:
            raise NotFoundError("this daemon serves no pages (server.pages is false)")
        address, needs_login = await self.find_address()
        if not needs_login:
            return PageLink(f"http://{address}/", 0)
        code = self.sessions.make_code(Actor(origin=f"page of {request.actor}"))
        return PageLink(f"http://{address}/login?code={code}", int(LOGIN_CODE_LIFETIME))
