"""`/api/v1/events`: who changed what is served or kept, with which outcome, and what was evicted."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from proxy.names import full_name, policy_name
from proxy.oci.reference import parse_image
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder
from proxy.storage.records.trail import Action, TrailEntry

MAX_TRAIL_ENTRIES = 1000


class TrailQuery(RequestModel, frozen=True):
    """Selects entries; `image` without tag and digest stands for its repository. `since` is Unix time."""

    image: str = ""
    action: Action | Literal[""] = ""
    since: float = 0.0
    limit: Annotated[int, Meta(ge=1, le=MAX_TRAIL_ENTRIES)] = 100


@dataclass(frozen=True, slots=True)
class TrailHandlers:
    """The handler of this route."""

    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("GET", "/api/v1/events", self.entries)]

    async def entries(self, request: AdminRequest) -> list[TrailEntry]:
        """Return entries, the latest first."""
        query = request.parse_query(TrailQuery)
        image = repository = ""
        if query.image:
            parsed = parse_image(query.image)
            found, reference = self.acts.names.to_repository(parsed)
            image = repository = policy_name(found)
            if parsed.tag or parsed.digest:
                image = full_name(found, reference)
        return await self.acts.trail.entries(
            image=image,
            repository=repository,
            action=query.action,
            since=query.since,
            limit=query.limit,
        )
