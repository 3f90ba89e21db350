"""A fake of Docker Hub's own API: its search (version 4), and what it says about tags."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from tests.fakes.faults import Fault, Reply, Rule
from tests.fakes.http_server import FakeServer, ReceivedRequest, RequestLog
from tests.fakes.startable import Startable

_TAG = re.compile(r"/v2/namespaces/([^/]+)/repositories/([^/]+)/tags/([^/?]+)")


@dataclass(slots=True)
class HubRepository:
    """A repository as Docker Hub's search shows it; `badge` is Docker Hub's own word or None."""

    name: str
    badge: str | None = None
    publisher: str = ""
    description: str = ""
    stars: int = 0
    pulls: int = 0
    archived: bool = False


class FakeHub(Startable):
    """Add `repositories` and `pushed`, and use `url` as `facts_url`.

    `pushed` maps repository and tag to digest and Unix time.
    """

    def __init__(self) -> None:
        self.repositories: list[HubRepository] = []
        self.pushed: dict[tuple[str, str], tuple[str, float]] = {}
        self.log = RequestLog()
        self.server = FakeServer("hub", self._answer, self.log)

    @property
    def url(self) -> str:
        """The URL of the API."""
        return self.server.url

    @property
    def requests(self) -> list[ReceivedRequest]:
        """All requests so far."""
        return self.log.requests

    def break_with(self, fault: Fault, match: str = "") -> None:
        """Answer matching requests with a fault from now on."""
        self.server.rules.append(Rule(re.compile(match), fault, None))

    def repair(self) -> None:
        """Answer correctly again."""
        self.server.rules.clear()

    async def start(self) -> None:
        """Listen on a free port, later on the same one."""
        await self.server.start()

    async def stop(self) -> None:
        """Stop listening."""
        await self.server.stop()

    def _answer(self, request: web.BaseRequest) -> Reply:
        if request.path == "/api/search/v4":
            return self._search(request)
        if match := _TAG.fullmatch(request.path):
            namespace, name, tag = map(unquote, match.groups())
            return self._tag(f"{namespace}/{name}", tag)
        return _json_reply(404, {"message": "object not found"})

    def _search(self, request: web.BaseRequest) -> Reply:
        terms = request.query.get("query", "")
        badges = set(filter(None, request.query.get("badges", "").split(",")))
        found = [
            one
            for one in self.repositories
            if terms in one.name and (not badges or one.badge in badges)
        ]
        start, size = int(request.query.get("from", 0)), int(request.query.get("size", 25))
        results = [
            {
                "id": one.name,
                "name": one.name,
                "slug": one.name,
                "type": "image",
                "publisher": {"id": one.publisher.lower(), "name": one.publisher},
                "short_description": one.description,
                "badge": one.badge,
                "star_count": one.stars,
                "pull_count": "1M+",
                "raw_pull_count": one.pulls,
                "archived": one.archived,
            }
            for one in found[start : start + size]
        ]
        return _json_reply(200, {"total": len(found), "results": results})

    def _tag(self, repository: str, tag: str) -> Reply:
        if (repository, tag) not in self.pushed:
            return _json_reply(404, {"message": "object not found"})
        digest, at = self.pushed[repository, tag]
        time = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        document = {"name": tag, "digest": digest, "tag_last_pushed": time, "images": []}
        return _json_reply(200, document)


def _json_reply(status: int, document: dict[str, Any]) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(document).encode())
