"""What the webhook reports: conditions that begin or end, acts that failed, refusals of policies."""

from collections.abc import Mapping

from proxy.storage.records.policy_rows import DecisionRecord
from proxy.storage.records.trail import TrailEntry
from proxy.storage.space import SpaceManager
from proxy.upstream.client import Upstream
from proxy.upstream.webhook import Webhook

# Shares at which the alerts fire too (config/prometheus): of the pulls left, and of pins in the store.
LOW_PULLS_SHARE = 0.1
FULL_PINS_SHARE = 0.9
# Images that an event names.
MAX_REPORTED_IMAGES = 20

_REFUSALS = ("deny", "unripe", "unknown")


class ConditionWatcher:
    """Compares the state of upstreams and store with that of the last `check`, and reports changes.

    A condition is reported when it begins, and for upstreams when it ends; those that are there at
    the start are reported too.
    """

    def __init__(self, webhook: Webhook) -> None:
        self._webhook = webhook
        self._down: set[str] = set()
        self._low: set[str] = set()
        self._is_full = False

    def check(self, upstreams: Mapping[str, Upstream], space: SpaceManager) -> None:
        """Report what has begun or ended."""
        for name, upstream in upstreams.items():
            self._check_outage(name, upstream)
            self._check_quota(name, upstream)
        self._down &= upstreams.keys()
        self._low &= upstreams.keys()
        pinned, limit = space.pinned_bytes, space.max_size
        is_full = pinned > limit * FULL_PINS_SHARE
        if is_full and not self._is_full:
            self._webhook.notify("store.pins_full", "store", pinned=pinned, limit=limit)
        self._is_full = is_full

    def _check_outage(self, name: str, upstream: Upstream) -> None:
        if not upstream.is_up and name not in self._down:
            self._down.add(name)
            self._webhook.notify("upstream.down", name, reason=upstream.outage_reason)
        elif upstream.is_up and name in self._down:
            self._down.remove(name)
            self._webhook.notify("upstream.up", name)

    def _check_quota(self, name: str, upstream: Upstream) -> None:
        limit, remaining = upstream.pull_quota
        if limit is None or remaining is None or remaining >= limit * LOW_PULLS_SHARE:
            self._low.discard(name)
        elif name not in self._low:
            self._low.add(name)
            self._webhook.notify("ratelimit.low", name, limit=limit, remaining=remaining)


def report_entry(webhook: Webhook, entry: TrailEntry) -> None:
    """Report an entry of the audit trail that an operator should know of."""
    images = [name for name in entry.images if name][:MAX_REPORTED_IMAGES]
    if entry.action == "evict" and entry.detail == "corrupt":
        webhook.notify("blob.corrupt", "store", images=images, bytes=sum(entry.images.values()))
    elif entry.action == "preload" and entry.outcome == "failed":
        webhook.notify(
            "preload.failed", entry.actor, images=images, reason=entry.detail, actor=entry.actor
        )


def report_decision(webhook: Webhook, decision: DecisionRecord) -> None:
    """Report the decision of a policy if it refused an image."""
    if decision.decision in _REFUSALS:
        webhook.notify(
            "policy.refused",
            decision.image,
            decision=decision.decision,
            policy=decision.policy,
            digest=decision.digest,
            reason=decision.reason,
        )
