"""`/api/v1/images/refresh`: ask upstream now what tags mean."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from proxy.cache.refresh import RefreshedTag, TagRefresher
from proxy.errors import InvalidRequestError
from proxy.images.manage import ImageManager, is_glob
from proxy.names import NameParser
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder
from proxy.storage.records.trail import Act


class RefreshRequest(RequestModel, frozen=True):
    """The tags to refresh, by name or by globs over the stored ones; `all` of the stored ones."""

    images: tuple[str, ...] = ()
    all: bool = False


@dataclass(frozen=True, slots=True)
class RefreshHandlers:
    """The handler of this route."""

    refresher: TagRefresher
    images: ImageManager
    names: NameParser
    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("POST", "/api/v1/images/refresh", self.refresh)]

    async def refresh(self, request: AdminRequest) -> AsyncGenerator[RefreshedTag, None]:
        """Ask upstream about tags, and yield what it says of each."""
        body = await request.read_json(RefreshRequest)
        if bool(body.images) == body.all:
            raise InvalidRequestError("pass images, or set all")
        tags: dict[tuple[Repository, Tag], None] = {}
        for text in ["*"] if body.all else body.images:
            tags |= dict.fromkeys(await self._find_tags(text))
        outcomes: dict[str, list[str]] = {}
        recorded = self.acts.recording("refresh", request.actor, body.images)
        async with recorded as act, aclosing(self.refresher.refresh([*tags])) as events:
            async for event in events:
                outcomes.setdefault(event.outcome, []).append(event.image)
                yield event
            await self._record(act, outcomes)

    async def _record(self, act: Act, outcomes: Mapping[str, Sequence[str]]) -> None:
        """Record an act for each outcome, so that each image has its own; `act` is the last one."""
        total = sum(map(len, outcomes.values()))
        for number, (outcome, images) in enumerate(outcomes.items(), 1):
            one = act if number == len(outcomes) else Act("refresh", act.actor)
            one.images = self.acts.full_names(sorted(images))
            of_all = f" of {total}" if len(outcomes) > 1 else ""
            one.detail = f"{len(images)}{of_all} {outcome.replace('_', ' ')}"
            if outcome in ("failed", "not_found"):
                one.outcome = "failed"
            if one is not act:
                await self.acts.trail.add(one)

    async def _find_tags(self, text: str) -> list[tuple[Repository, Tag]]:
        if is_glob(text):
            found = await self.images.find(text)
            return [(one, tag) for one, tag in found if not isinstance(tag, Digest)]
        repository, reference = self.names.parse_allowed(text)
        if isinstance(reference, Digest):
            raise InvalidRequestError(f"{text[:200]} is a digest, which always means the same")
        return [(repository, reference)]
