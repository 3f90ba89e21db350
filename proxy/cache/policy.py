"""Enforcement of policies: what is judged when a client asks for a manifest, and what it is given.

The rules and the pure decision are in `proxy.policy`. Here the facts are gathered, a tag is kept at the
newest content that is old enough, and decisions are logged, counted and kept. Blobs need no decision:
nothing names them but manifests.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

from proxy.cache.facts import FactsCache
from proxy.cache.stand_ins import StandIns
from proxy.errors import (
    InvalidManifestError,
    PolicyDeniedError,
    PolicyUndecidedError,
    StorageError,
    UpstreamError,
)
from proxy.log import get_logger, request_id
from proxy.lru import CachedManifest, TTLCache
from proxy.metrics import Metrics
from proxy.names import display_name, full_name, policy_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import parse_manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.parsing import DocumentParser
from proxy.policy.exemption import is_exempt
from proxy.policy.facts import FIRST_SEEN, PUSHED, ContentAge, ImageFacts, is_official
from proxy.policy.judge import ALLOWED, PolicyDecision, Verdict, judge
from proxy.policy.rules import PolicyRule, RuleSet
from proxy.storage.index import Index
from proxy.storage.records.policies import PolicyRecords
from proxy.storage.records.policy_rows import DecisionRecord, PolicyException

# Characters of a message that clients print.
_MESSAGE_LENGTH = 200
# Permissions that are kept in memory.
MAX_REMEMBERED_PERMISSIONS = 20_000
# Seconds for which a permission is kept; facts about publishers are asked for daily.
PERMISSION_TTL = 3600.0
# Decisions that wait to be written to the index; beyond them the oldest are not written.
MAX_UNWRITTEN_DECISIONS = 1_000
# Seconds after which a client may ask again for what could not be decided, and after which it is decided
# anew what was allowed without knowing.
UNDECIDED_RETRY_AFTER = 60.0

log = get_logger(__name__)


class Permission(msgspec.Struct, frozen=True):
    """What a reference may be served as: the content of `digest`, between these Unix times.

    `warning` is for the client: what a rule in audit mode would have done, or that older content
    stands in. `refusal` is the answer instead if that content cannot be had any more.
    """

    digest: Digest
    made_at: float
    expires_at: float
    warning: str = ""
    refusal: PolicyDeniedError | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policies say about the content of a reference. `rule` is None if none is about it.

    `earlier` is what a tag means meanwhile, if its content is too young.
    """

    verdict: Verdict
    rule: PolicyRule | None = None
    earlier: Digest | None = None

    @property
    def is_allowed(self) -> bool:
        """Whether clients get an image: it is allowed, its rule only audits, or older content stands in."""
        is_allowed = self.verdict.decision is PolicyDecision.ALLOW or self.earlier is not None
        return is_allowed or not self.is_enforced

    @property
    def is_enforced(self) -> bool:
        """Whether clients are refused what the verdict does not allow."""
        return self.rule is not None and self.rule.settings.mode == "enforce"


class PolicyGate:
    """Decides what is served for a reference. Without a rule everything is allowed.

    `on_decision` is called with each decision that is recorded.
    """

    def __init__(
        self,
        rules: RuleSet,
        *,
        index: Index,
        records: PolicyRecords,
        facts: FactsCache,
        stand_ins: StandIns,
        parser: DocumentParser,
        metrics: Metrics,
        clock: Callable[[], float],
        on_decision: Callable[[DecisionRecord], None] = lambda _: None,
    ) -> None:
        self.rules = rules
        self._on_decision = on_decision
        self._index = index
        self._records = records
        self._facts = facts
        self._stand_ins = stand_ins
        self._parser = parser
        self._metrics = metrics
        self._clock = clock
        self._permissions: dict[tuple[Repository, Reference], Permission] = {}
        self._refusals: TTLCache[tuple[Repository, Tag], tuple[PolicyDeniedError, float]]
        self._refusals = TTLCache(MAX_REMEMBERED_PERMISSIONS, clock)
        self._writing = asyncio.Lock()
        self._unwritten: deque[DecisionRecord] = deque(maxlen=MAX_UNWRITTEN_DECISIONS)

    def find_permission(self, repository: Repository, reference: Reference) -> Permission | None:
        """Return a permission that still holds, without waiting; None if it must be decided."""
        kept = self._permissions.get((repository, reference))
        if kept is not None and kept.made_at <= self._clock() < kept.expires_at:
            return kept
        return None

    def _remember(
        self, repository: Repository, reference: Reference, permission: Permission
    ) -> None:
        """Keep a permission; beyond `MAX_REMEMBERED_PERMISSIONS` the oldest are decided anew."""
        self._permissions.pop((repository, reference), None)
        self._permissions[repository, reference] = permission
        if len(self._permissions) > MAX_REMEMBERED_PERMISSIONS:
            del self._permissions[next(iter(self._permissions))]

    def raise_if_refused(self, repository: Repository, tag: Tag, ttl: float) -> None:
        """Raise the refusal of a tag again for `ttl` seconds, so that upstream is not asked again."""
        refused = self._refusals.get_with_age((repository, tag))
        if refused and 0 <= refused[0] < ttl and self._clock() < refused[1][1]:
            raise copy(refused[1][0])

    def forget(self) -> None:
        """Decide everything anew: an exception was made, or a bundle brought facts."""
        self._permissions.clear()
        self._refusals.clear()

    async def admit(
        self,
        repository: Repository,
        reference: Reference,
        manifest: CachedManifest,
        *,
        is_current: bool = False,
    ) -> Permission:
        """Return what may be served for a reference whose content is `manifest`.

        `is_current` says that upstream has just named this content for the tag. Otherwise newer content
        that the tag meant meanwhile, and that was too young, takes its place once it may.
        Raises `PolicyDeniedError`, and `PolicyUndecidedError` if a fact cannot be had now.
        """
        kept = None if is_current else self.find_permission(repository, reference)
        if kept:
            return kept
        rule = self.rules.find(policy_name(repository))
        if rule is None:
            permission = Permission(manifest.digest, -math.inf, math.inf)
        else:
            try:
                permission = await self._decide(rule, repository, reference, manifest, is_current)
            except StorageError as error:
                raise PolicyUndecidedError(f"{rule.name} cannot decide now: {error}") from error
        self._remember(repository, reference, permission)
        return permission

    async def judge(
        self, repository: Repository, reference: Reference, manifest: CachedManifest
    ) -> Judgement:
        """Return what the policies say about an image, without serving or recording anything."""
        rule = self.rules.find(policy_name(repository))
        if rule is None:
            return Judgement(ALLOWED)
        verdict = await self._judge(rule, repository, reference, manifest)
        earlier = None
        if isinstance(reference, Tag) and rule.settings.mode == "enforce":
            now, digest = self._clock(), manifest.digest
            earlier = self._find_stand_in(rule, verdict, repository, reference, digest, now)
        return Judgement(verdict, rule, earlier)

    def report_exception(self, exception: PolicyException) -> None:
        """Log an exception that was made, and keep it among the decisions."""
        image = full_name(exception.repository, exception.digest)
        until = _format_time(exception.until)
        log.info("policy_exception_added", image=image, until=until, reason=exception.reason)
        self._keep(
            DecisionRecord(
                exception.made_at,
                0,
                "exception",
                image,
                str(exception.digest),
                f"until {until}: {exception.reason}",
                request_id.get(),
            )
        )

    def find_ripening(
        self, repository: Repository, reference: Reference
    ) -> tuple[Digest, str] | None:
        """Return the content that clients get once it is old enough, and what they are told until then.

        None if they get it already. To be called after the reference was judged.
        """
        permission = self.find_permission(repository, reference)
        if permission and permission.refusal is None:
            return None
        warning = permission.warning if permission else ""
        if isinstance(reference, Digest):
            return reference, warning
        newest = next(iter(self.known_meanings(repository, reference)), None)
        return (newest, warning) if newest else None

    def known_meanings(self, repository: Repository, tag: Tag) -> list[Digest]:
        """Return the digests that a tag is known to have meant, the most recent first."""
        return [meaning.digest for meaning in self._records.meanings(repository, tag)]

    def _keep(self, decision: DecisionRecord) -> None:
        self._unwritten.append(decision)
        self._on_decision(decision)

    async def write_decisions(self) -> None:
        """Write the decisions since the last call to the index. Raises `StorageError`."""
        # One at a time: two would write the same decisions.
        async with self._writing:
            if self._unwritten:
                decisions = list(self._unwritten)
                await self._records.add_decisions(decisions)
                # If more have come meanwhile than fit, the first of these are gone already.
                for _ in range(min(len(decisions), len(self._unwritten))):
                    self._unwritten.popleft()

    async def _decide(
        self,
        rule: PolicyRule,
        repository: Repository,
        reference: Reference,
        manifest: CachedManifest,
        is_current: bool,
    ) -> Permission:
        now = self._clock()
        digest = manifest.digest
        if isinstance(reference, Tag) and not is_current:
            digest = next(iter(self.known_meanings(repository, reference)), digest)
        verdict = await self._judge(rule, repository, reference, manifest, digest)
        expires_at = min(now + PERMISSION_TTL, verdict.until or math.inf)
        if verdict.decision is PolicyDecision.ALLOW:
            if verdict.is_uncertain:
                expires_at = min(expires_at, now + UNDECIDED_RETRY_AFTER)
            await self._record_allowed(rule, repository, reference, digest, verdict)
            return Permission(digest, now, expires_at)
        if verdict.decision is PolicyDecision.UNRIPE:
            await self._record_meaning(repository, reference, digest, now)
        if rule.settings.mode == "audit":
            self._report(rule, f"would_{verdict.decision}", repository, reference, digest, verdict)
            image = display_name(repository, reference)
            warning = _fit_message(f"{rule.name} would refuse", image, f": {verdict.reason}")
            return Permission(digest, now, expires_at, warning)
        error = self._refusal(rule, repository, reference, verdict)
        if (
            isinstance(error, PolicyDeniedError)
            and isinstance(reference, Tag)
            and (earlier := self._find_stand_in(rule, verdict, repository, reference, digest, now))
        ):
            self._stand_ins.add(earlier)
            self._report(rule, "previous", repository, reference, digest, verdict)
            until = _format_time(verdict.until)
            warning = (
                f"{display_name(repository, reference)} has moved; its earlier content is "
                f"served until {until} ({rule.name}: {verdict.reason})"
            )
            return Permission(earlier, now, expires_at, warning, error)
        self._report(rule, verdict.decision.value, repository, reference, digest, verdict)
        if isinstance(reference, Tag) and isinstance(error, PolicyDeniedError):
            self._refusals.set((repository, reference), (copy(error), expires_at))
        raise error

    async def _record_allowed(
        self,
        rule: PolicyRule,
        repository: Repository,
        reference: Reference,
        digest: Digest,
        verdict: Verdict,
    ) -> None:
        if verdict.is_uncertain:
            self._report(rule, "allowed_unknown", repository, reference, digest, verdict)
        else:
            self._count(rule, "allow")
        # What an exception allows for a time is not old enough after it.
        if rule.settings.min_age and verdict.until is None:
            await self._mark_ripe(repository, reference, digest, self._clock())

    async def _judge(
        self,
        rule: PolicyRule,
        repository: Repository,
        reference: Reference,
        manifest: CachedManifest,
        digest: Digest | None = None,
    ) -> Verdict:
        """Return the verdict on `digest`, by default that of the manifest."""
        now, digest = self._clock(), digest or manifest.digest
        if exception := self._records.exception(repository, digest, now):
            return Verdict(PolicyDecision.ALLOW, "an exception allows it", exception.until)
        if isinstance(reference, Digest):
            for parent in self._index.parents(repository, digest):
                # What an allowed index names is allowed: clients ask for it by digest.
                if exception := self._records.exception(repository, parent, now):
                    reason = "an exception allows its index"
                    return Verdict(PolicyDecision.ALLOW, reason, exception.until)
                verdict = await self._judge_content(rule, repository, parent, parent, now)
                if verdict.decision is PolicyDecision.ALLOW:
                    return verdict
        verdict = await self._judge_content(rule, repository, reference, digest, now)
        if verdict.decision is not PolicyDecision.ALLOW and digest == manifest.digest:
            with suppress(InvalidManifestError):
                if await self._parser.run(
                    repository.upstream, len(manifest.content), _is_exempt, manifest
                ):
                    return Verdict(PolicyDecision.ALLOW, "it is a signature or another artifact")
        return verdict

    async def _judge_content(
        self,
        rule: PolicyRule,
        repository: Repository,
        reference: Reference,
        digest: Digest,
        now: float,
    ) -> Verdict:
        settings = rule.settings
        tag = reference if isinstance(reference, Tag) else None
        facts = ImageFacts(
            policy_name(repository), tag, has_badges=self._facts.has_facts(repository)
        )
        if settings.trusted and not is_official(facts.name):
            badge = (await self._facts.get(repository, digest)).badge
            facts = replace(facts, badge=badge)
        if settings.min_age:
            age, is_ripe = await self._find_age(repository, tag, digest, now)
            facts = replace(facts, age=age, is_ripe=is_ripe)
        return judge(settings, facts, now)

    async def _find_age(
        self, repository: Repository, tag: Tag | None, digest: Digest, now: float
    ) -> tuple[ContentAge | None, bool]:
        """Return the age of the content, None if it cannot be had now, and whether it was ripe before."""
        meaning = self._records.meaning(repository, digest)
        if meaning and (meaning.is_ripe or meaning.pushed_at is not None):
            return meaning.age, meaning.is_ripe
        age = meaning.age if meaning else ContentAge(now, FIRST_SEEN, is_first_sight=True)
        is_first_sight = age.is_first_sight and not self._records.has_history(
            repository, tag, digest
        )
        try:
            pushed_at = await self._facts.get_push_time(repository, tag, digest) if tag else None
        except UpstreamError:
            if is_first_sight:
                return None, False
            pushed_at = None
        if pushed_at is not None:
            return ContentAge(pushed_at, PUSHED), False
        return replace(age, is_first_sight=is_first_sight), False

    def _find_stand_in(
        self,
        rule: PolicyRule,
        verdict: Verdict,
        repository: Repository,
        tag: Tag,
        newest: Digest,
        now: float,
    ) -> Digest | None:
        """Return what a tag means while its newest content is too young, by the verdict on that.

        It is the newest content that the tag meant before and that is old enough.
        """
        if verdict.decision is not PolicyDecision.UNRIPE or rule.settings.unripe != "previous":
            return None
        name = policy_name(repository)
        for one in self._records.meanings(repository, tag):
            # What was old enough under another tag is so here.
            meaning = self._records.meaning(repository, one.digest) or one
            facts = ImageFacts(name, None, age=meaning.age, is_ripe=meaning.is_ripe)
            only_age = msgspec.structs.replace(rule.settings, trusted=(), allow=(), deny_tags=())
            if (
                meaning.digest != newest
                and judge(only_age, facts, now).decision is PolicyDecision.ALLOW
            ):
                return meaning.digest
        return None

    async def _mark_ripe(
        self, repository: Repository, reference: Reference, digest: Digest, now: float
    ) -> None:
        meaning = self._records.meaning(repository, digest)
        if meaning and meaning.is_ripe:
            return
        try:
            if meaning is None:
                await self._record_meaning(repository, reference, digest, now)
            await self._records.mark_ripe(repository, digest)
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    async def _record_meaning(
        self, repository: Repository, reference: Reference, digest: Digest, now: float
    ) -> None:
        """Record since when the content is known, so that its age is counted from there."""
        tag = reference if isinstance(reference, Tag) else None
        if any(one.digest == digest for one in self._records.meanings(repository, tag)):
            return
        pushed_at = None
        if tag:
            with suppress(UpstreamError):
                pushed_at = await self._facts.get_push_time(repository, tag, digest)
        try:
            await self._records.record_meaning(repository, tag, digest, now, pushed_at)
        except StorageError as error:
            log.warning("index_write_failed", reason=str(error))

    def _refusal(
        self, rule: PolicyRule, repository: Repository, reference: Reference, verdict: Verdict
    ) -> PolicyDeniedError | PolicyUndecidedError:
        image = display_name(repository, reference)
        if verdict.decision is PolicyDecision.UNKNOWN:
            helps = "try again later"
            if self._facts.is_offline:
                helps = "this cache is offline: import a bundle that was made with export --facts"
            message = _fit_message(
                f"{rule.name} cannot decide about", image, f" now: {verdict.reason}; {helps}"
            )
            return PolicyUndecidedError(message, retry_after=UNDECIDED_RETRY_AFTER)
        helps = "to allow it: pullcache policy except"
        if verdict.until:
            helps = f"it may be pulled from {_format_time(verdict.until)}"
        message = _fit_message(f"{rule.name} refuses", image, f": {verdict.reason}; {helps}")
        return PolicyDeniedError(message, ripe_at=verdict.until)

    def _count(self, rule: PolicyRule, decision: str) -> None:
        self._metrics.count_policy_decision(rule.number, decision)

    def _report(
        self,
        rule: PolicyRule,
        decision: str,
        repository: Repository,
        reference: Reference,
        digest: Digest,
        verdict: Verdict,
    ) -> None:
        """Count a decision, log it, and keep it for the index."""
        self._count(rule, decision)
        image = full_name(repository, reference)
        log.info(
            "policy_decided",
            decision=decision,
            policy=rule.number,
            image=image,
            digest=str(digest),
            reason=verdict.reason,
        )
        self._keep(
            DecisionRecord(
                self._clock(),
                rule.number,
                decision,
                image,
                str(digest),
                verdict.reason,
                request_id.get(),
            )
        )


def _is_exempt(manifest: CachedManifest) -> bool:
    return is_exempt(parse_manifest(manifest.content, manifest.media_type), manifest.content)


def _fit_message(before: str, image: str, after: str) -> str:
    """Return a message about an image; if it is too long, the image's name is cut."""
    room = max(20, _MESSAGE_LENGTH - len(before) - len(after) - 1)
    name = image if len(image) <= room else f"{image[: room - 3]}..."
    return f"{before} {name}{after}"[:_MESSAGE_LENGTH]


def _format_time(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at or 0, UTC):%Y-%m-%dT%H:%M:%SZ}"
