"""A browser without a window: a client of the pages with cookies, and forms as browsers post them."""

import asyncio
import re
from dataclasses import dataclass
from html import unescape
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.cli.api_client import AdminClient
from tests.support.program import Program


@dataclass(frozen=True, slots=True)
class Shown:
    """What the browser shows: the status, the headers, the text, and the path that it ended at."""

    status: int
    headers: CIMultiDictProxy[str]
    text: str
    path: str

    @property
    def token(self) -> str:
        """The token of the page's forms."""
        found = re.search(r'name="token" value="([0-9a-f]+)"', self.text)
        assert found, self.text
        return found[1]

    @property
    def notice(self) -> str:
        """The message that the page shows."""
        found = re.search(r'class="notice[^"]*" role="\w+">([^<]*)', self.text)
        return unescape(found[1]) if found else ""


class PageClient:
    """A browser of its own: `headers` are sent with each request, unless a request has others."""

    def __init__(self, address: str, **headers: str) -> None:
        self.url = f"http://{address}"
        self.headers = {"Accept": "text/html", "Sec-Fetch-Site": "same-origin", **headers}
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP session."""
        if self._session is None:
            jar = aiohttp.CookieJar(unsafe=True)
            self._session = aiohttp.ClientSession(cookie_jar=jar)
        return self._session

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def get(self, path: str, *, follow: bool = True, **headers: str) -> Shown:
        """Request a page; follow redirects."""
        return await self._request("GET", path, follow, headers)

    async def post(
        self,
        path: str,
        fields: dict[str, Any] | None = None,
        *,
        follow: bool = True,
        **headers: str,
    ) -> Shown:
        """Post a form as it is, without a token of ours."""
        body = urlencode(fields or {}, doseq=True)
        headers = {"Content_Type": "application/x-www-form-urlencoded", **headers}
        return await self._request("POST", path, follow, headers, body.encode())

    async def submit(self, page: str, path: str, **fields: Any) -> Shown:
        """Post a form of a page, with its token, and follow to the page that results."""
        token = (await self.get(page)).token
        return await self.post(path, {"token": token, "back": page, **fields})

    async def log_in(self, secret: str) -> Shown:
        """Log in by a token."""
        return await self.post("/login", {"secret": secret})

    async def _request(
        self, method: str, path: str, follow: bool, headers: dict[str, str], body: bytes = b""
    ) -> Shown:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        merged = {**self.headers, **named}
        sent = {name: value for name, value in merged.items() if value}
        async with self.session.request(
            method,
            URL(self.url + path, encoded=True),
            headers=sent,
            data=body or None,
            allow_redirects=follow,
        ) as response:
            text = await response.text()
            path = response.url.raw_path_qs
            return Shown(response.status, response.headers, text, path)


async def make_link(program: Program) -> str:
    """Return the link that `pullcache ui` prints."""
    link = await asyncio.to_thread(AdminClient(program.root).post, "/api/v1/pages/link")
    return str(link["url"])
