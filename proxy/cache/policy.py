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
from proxy.policy.exemption import is_exempt
from proxy.policy.facts import FIRST_SEEN, PUSHED, ContentAge, ImageFacts, is_official
from proxy.policy.judge import ALLOWED, PolicyDecision, Verdict, judge
from proxy.policy.rules import PolicyRule, RuleSet
from proxy.storage.index import Index
from proxy.storage.policy_records import PolicyRecords
from proxy.storage.policy_rows import DecisionRecord, PolicyException

# Permissions that are kept in memory.
MAX_REMEMBERED_PERMISSIONS = 20_000
# Seconds for which a permission is kept; facts about publishers are asked for daily.
PERMISSION_TTL = 3600.0
# Decisions that wait to be written to the index; beyond them the oldest are not written.
MAX_UNWRITTEN_DECISIONS = 1_000
# Seconds after which a client may ask again for what could not be decided.
UNDECIDED_RETRY_AFTER = 60.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Permission:
    """What a reference may be served as: the content of `digest`, until the Unix time `expires_at`.

    `warning` is for the client: what a rule in audit mode would have done, or that older content
    stands in.
    """

    digest: Digest
    expires_at: float
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policies say about the content of a reference. `rule` is None if none is about it."""

    verdict: Verdict
    rule: PolicyRule | None = None

    @property
    def is_allowed(self) -> bool:
        """Whether clients get the image: it is allowed, or its rule only audits."""
        return self.verdict.decision is PolicyDecision.ALLOW or not self.is_enforced

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
        metrics: Metrics,
        clock: Callable[[], float],
        on_decision: Callable[[DecisionRecord], None] = lambda _: None,
    ) -> None:
        self._rules = rules
        self._on_decision = on_decision
        self._index = index
        self._records = records
        self._facts = facts
        self._metrics = metrics
        self._clock = clock
        self._permissions: TTLCache[tuple[Repository, Reference], Permission]
        self._permissions = TTLCache(MAX_REMEMBERED_PERMISSIONS, clock)
        self._refusals: TTLCache[tuple[Repository, Tag], PolicyDeniedError]
        self._refusals = TTLCache(MAX_REMEMBERED_PERMISSIONS, clock)
        self._writing = asyncio.Lock()
        self._unwritten: deque[DecisionRecord] = deque(maxlen=MAX_UNWRITTEN_DECISIONS)

    def find_permission(self, repository: Repository, reference: Reference) -> Permission | None:
        """Return a permission that still holds, without waiting; None if it must be decided."""
        kept = self._permissions.get_with_age((repository, reference))
        if kept and kept[0] >= 0 and self._clock() < kept[1].expires_at:
            return kept[1]
        return None

    def raise_if_refused(self, repository: Repository, tag: Tag, ttl: float) -> None:
        """Raise the refusal of a tag again for `ttl` seconds, so that upstream is not asked again."""
        refused = self._refusals.get_with_age((repository, tag))
        if refused and 0 <= refused[0] < ttl:
            raise copy(refused[1])

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
        rule = self._rules.find(policy_name(repository))
        if rule is None:
            permission = Permission(manifest.digest, math.inf)
        else:
            try:
                permission = await self._decide(rule, repository, reference, manifest, is_current)
            except StorageError as error:
                raise PolicyUndecidedError(f"{rule.name} cannot decide now: {error}") from error
        self._permissions.set((repository, reference), permission)
        return permission

    async def judge(
        self, repository: Repository, reference: Reference, manifest: CachedManifest
    ) -> Judgement:
        """Return what the policies say about an image, without serving or recording anything."""
        rule = self._rules.find(policy_name(repository))
        if rule is None:
            return Judgement(ALLOWED)
        return Judgement(await self._judge(rule, repository, reference, manifest), rule)

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
        expires_at = now + PERMISSION_TTL
        if verdict.decision is PolicyDecision.ALLOW:
            self._count(rule, "allow")
            if rule.settings.min_age:
                await self._mark_ripe(repository, reference, digest, now)
            return Permission(digest, expires_at)
        expires_at = min(expires_at, verdict.until or expires_at)
        if rule.settings.mode == "audit":
            self._report(rule, f"would_{verdict.decision}", repository, reference, digest, verdict)
            return Permission(digest, expires_at, f"{rule.name} would refuse it: {verdict.reason}")
        if verdict.decision is PolicyDecision.UNRIPE:
            await self._record_meaning(repository, reference, digest, now)
            if (
                isinstance(reference, Tag)
                and rule.settings.unripe == "previous"
                and (earlier := self._find_earlier(rule, repository, reference, digest, now))
            ):
                self._report(rule, "previous", repository, reference, digest, verdict)
                until = _format_time(verdict.until)
                warning = (
                    f"{display_name(repository, reference)} has moved; its earlier content is "
                    f"served until {until} ({rule.name}: {verdict.reason})"
                )
                return Permission(earlier, expires_at, warning)
        self._report(rule, verdict.decision.value, repository, reference, digest, verdict)
        error = _refusal(rule, repository, reference, verdict)
        if isinstance(reference, Tag) and isinstance(error, PolicyDeniedError):
            self._refusals.set((repository, reference), error)
        raise error

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
        if self._records.exception(repository, digest, now):
            return Verdict(PolicyDecision.ALLOW, "an exception allows it")
        if isinstance(reference, Digest):
            for parent in self._index.parents(repository, digest):
                # What an allowed index names is allowed: clients ask for it by digest.
                if self._records.exception(repository, parent, now):
                    return Verdict(PolicyDecision.ALLOW, "an exception allows its index")
                verdict = await self._judge_content(rule, repository, parent, parent, now)
                if verdict.decision is PolicyDecision.ALLOW:
                    return verdict
        verdict = await self._judge_content(rule, repository, reference, digest, now)
        if verdict.decision is not PolicyDecision.ALLOW and digest == manifest.digest:
            with suppress(InvalidManifestError):
                parsed = await asyncio.to_thread(
                    parse_manifest, manifest.content, manifest.media_type
                )
                if is_exempt(parsed, manifest.content):
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
        is_first_sight = meaning is None and not self._records.has_history(repository, tag)
        try:
            pushed_at = await self._facts.get_push_time(repository, tag, digest) if tag else None
        except UpstreamError:
            if is_first_sight:
                return None, False
            pushed_at = None
        if pushed_at is not None:
            return ContentAge(pushed_at, PUSHED), False
        first_seen = meaning.first_seen if meaning else now
        return ContentAge(first_seen, FIRST_SEEN, is_first_sight), False

    def _find_earlier(
        self, rule: PolicyRule, repository: Repository, tag: Tag, newest: Digest, now: float
    ) -> Digest | None:
        """Return the newest content that the tag meant before and that is old enough."""
        name = policy_name(repository)
        for meaning in self._records.meanings(repository, tag):
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


def _refusal(
    rule: PolicyRule, repository: Repository, reference: Reference, verdict: Verdict
) -> PolicyDeniedError | PolicyUndecidedError:
    # Messages have 200 characters, and the reason is what the client needs.
    image = display_name(repository, reference)[:90]
    if verdict.decision is PolicyDecision.UNKNOWN:
        return PolicyUndecidedError(
            f"{rule.name} cannot decide about {image} now: {verdict.reason}; try again later",
            retry_after=UNDECIDED_RETRY_AFTER,
        )
    until = f"; it may be pulled from {_format_time(verdict.until)}" if verdict.until else ""
    return PolicyDeniedError(f"{rule.name} refuses {image}: {verdict.reason}{until}")


def _format_time(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at or 0, UTC):%Y-%m-%dT%H:%MZ}"
