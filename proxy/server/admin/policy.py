"""`/api/v1/policy`: what the policies say about images, their exceptions and their decisions."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.cache.manifests import ManifestCache
from proxy.cache.policy import PolicyGate
from proxy.config import Config, PolicySettings
from proxy.config.dump import to_plain
from proxy.errors import InvalidReferenceError, NotFoundError, ProxyError, error_code
from proxy.names import NameParser, full_name, policy_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag, parse_image
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder
from proxy.storage.records.policies import PolicyRecords
from proxy.storage.records.policy_rows import DecisionRecord, PolicyException
from proxy.timestamps import to_seconds

MAX_CHECKED_IMAGES = 1_000
# An exception ends; one that never does belongs into the rule.
MAX_EXCEPTION_SECONDS = 366 * 86_400.0
MAX_REASON_LENGTH = 300
# Tags with young content that are looked at for what ripens.
MAX_YOUNG_CONTENT = 2_000


class CheckPolicyRequest(RequestModel, frozen=True):
    """The images to check."""

    images: Annotated[list[str], Meta(min_length=1, max_length=MAX_CHECKED_IMAGES)]


class ExceptionRequest(RequestModel, frozen=True):
    """An image by digest that is allowed for `seconds`, and why."""

    image: str
    seconds: Annotated[float, Meta(gt=0, le=MAX_EXCEPTION_SECONDS)]
    reason: Annotated[str, Meta(min_length=1, max_length=MAX_REASON_LENGTH)]


class RemoveExceptionRequest(RequestModel, frozen=True):
    """The image whose exception ends now, by digest."""

    image: str


class RipeningQuery(RequestModel, frozen=True):
    """How many tags are returned at most."""

    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100


class RipeningTag(msgspec.Struct, frozen=True):
    """A tag whose newest content is too young for a policy, until `ripe_at` in Unix time.

    `served` is the digest that clients get meanwhile, empty if they are refused.
    """

    image: str
    digest: str
    since: int
    ripe_at: int
    policy: int
    mode: str
    served: str


class DecisionsQuery(RequestModel, frozen=True):
    """Selects decisions; `since` is Unix time."""

    since: float = 0.0
    decision: str = ""
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 1_000


class PolicyCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What the policies say about one image.

    `decision` is `allow`, `deny`, `unripe`, `previous` (unripe too, and `earlier` is the digest that the tag
    means meanwhile), `unknown`, or `error` if the image could not be had, with `reason` saying why. `policy` is the number of the rule, 0 if none is about the image.
    `is_allowed` is also true if the rule only audits. `until` is when the decision ends, in Unix time: an
    unripe image may be pulled, or an exception is over.
    """

    image: str
    decision: str
    is_allowed: bool
    policy: int = 0
    mode: str = ""
    digest: str = ""
    earlier: str = ""
    reason: str = ""
    until: int | None = None


class ExceptionSummary(msgspec.Struct, frozen=True):
    """An image that is allowed until a time, and why. Times are Unix time."""

    image: str
    made: int
    until: int
    reason: str


class PolicyOverview(msgspec.Struct, frozen=True):
    """The rules as the configuration has them, in order, and the exceptions."""

    policies: list[dict[str, object]]
    exceptions: list[ExceptionSummary]


@dataclass(frozen=True, slots=True)
class PolicyHandlers:
    """The handlers of these routes."""

    config: Config
    names: NameParser
    manifests: ManifestCache
    gate: PolicyGate
    records: PolicyRecords
    acts: ActRecorder
    clock: Callable[[], float]

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/policy", self.show),
            Route("POST", "/api/v1/policy/check", self.check, is_read=True),
            Route("POST", "/api/v1/policy/exceptions", self.add_exception),
            Route("POST", "/api/v1/policy/exceptions/remove", self.remove_exception),
            Route("GET", "/api/v1/policy/ripening", self.list_ripening),
            Route("GET", "/api/v1/policy/decisions", self.list_decisions),
        ]

    async def show(self, _request: AdminRequest) -> PolicyOverview:
        """Return rules and exceptions."""
        return PolicyOverview(
            [_describe_rule(number, one) for number, one in enumerate(self.config.policy, start=1)],
            [_describe_exception(one) for one in self.records.exceptions()],
        )

    async def check(self, request: AdminRequest) -> AsyncGenerator[PolicyCheck, None]:
        """Yield for each image what the policies say."""
        for image in (await request.read_json(CheckPolicyRequest)).images:
            yield await self._check_image(image)

    async def add_exception(self, request: AdminRequest) -> ExceptionSummary:
        """Allow an image for a time, whatever the policies say."""
        body = await request.read_json(ExceptionRequest)
        repository, reference = self.names.parse_allowed(body.image)
        if not isinstance(reference, Digest):
            raise InvalidReferenceError(
                f"{body.image[:100]}: an exception is for a digest (write IMAGE@sha256:…; "
                "policy check prints it)"
            )
        now = self.clock()
        exception = PolicyException(repository, reference, now, now + body.seconds, body.reason)
        async with self.acts.recording("exception", request.actor, [body.image]) as act:
            act.detail = f"for {body.seconds:.0f} s: {body.reason}"
            await self.records.add_exception(exception)
        self.gate.forget()
        self.gate.report_exception(exception)
        return _describe_exception(exception)

    async def remove_exception(self, request: AdminRequest) -> None:
        """End an exception."""
        image = (await request.read_json(RemoveExceptionRequest)).image
        repository, reference = self.names.to_repository(parse_image(image))
        if not isinstance(reference, Digest):
            raise InvalidReferenceError(f"{image[:100]}: write IMAGE@sha256:…, as it is listed")
        async with self.acts.recording("exception", request.actor, [image]) as act:
            act.detail = "removed"
            if not await self.records.remove_exception(repository, reference):
                raise NotFoundError(f"there is no exception for {image[:200]}")
        self.gate.forget()

    async def list_ripening(self, request: AdminRequest) -> list[RipeningTag]:
        """Return the tags whose newest content is too young, the one that ripens first at the head."""
        limit = request.parse_query(RipeningQuery).limit
        rules = self.gate.rules
        longest = max((float(one.settings.min_age) for one in rules.rules), default=0.0)
        if not longest:
            return []
        now, found = self.clock(), list[RipeningTag]()
        for one in await self.records.young_content(now - longest, MAX_YOUNG_CONTENT):
            rule = rules.find(policy_name(one.repository))
            if rule is None or (ripe_at := one.since + rule.settings.min_age) <= now:
                continue
            served = one.served if one.served != one.digest else None
            found.append(
                RipeningTag(
                    image=full_name(one.repository, Tag(one.tag)),
                    digest=str(one.digest),
                    since=to_seconds(one.since),
                    ripe_at=to_seconds(ripe_at),
                    policy=rule.number,
                    mode=rule.settings.mode,
                    served=str(served or ""),
                )
            )
        return sorted(found, key=lambda one: one.ripe_at)[:limit]

    async def list_decisions(self, request: AdminRequest) -> list[DecisionRecord]:
        """Return decisions, the latest first."""
        query = request.parse_query(DecisionsQuery)
        await self.gate.write_decisions()
        found = self.records.decisions(query.since, query.decision, query.limit)
        return [replace(one, at=to_seconds(one.at)) for one in found]

    async def _check_image(self, image: str) -> PolicyCheck:
        try:
            repository, reference = self.names.parse_allowed(image)
            manifest = await self.manifests.get_unjudged_manifest(repository, reference)
            judgement = await self.gate.judge(repository, reference, manifest)
        except ProxyError as error:
            return PolicyCheck(
                image=image,
                decision="error",
                is_allowed=False,
                reason=f"{error_code(error)}: {error}",
            )
        rule, verdict = judgement.rule, judgement.verdict
        return PolicyCheck(
            image=full_name(repository, reference),
            decision="previous" if judgement.earlier else verdict.decision.value,
            is_allowed=judgement.is_allowed,
            policy=rule.number if rule else 0,
            mode=rule.settings.mode if rule else "",
            digest=str(manifest.digest),
            earlier=str(judgement.earlier or ""),
            reason=verdict.reason,
            until=to_seconds(verdict.until),
        )


def _describe_rule(number: int, rule: PolicySettings) -> dict[str, object]:
    return {"policy": number, **to_plain(rule)}


def _describe_exception(exception: PolicyException) -> ExceptionSummary:
    return ExceptionSummary(
        full_name(exception.repository, exception.digest),
        to_seconds(exception.made_at),
        to_seconds(exception.until),
        exception.reason,
    )
