"""How long a tag stays fresh, and how long a stale copy of it may be served. Pure.

`proxy.repository_rules` chooses the TTL; `manifests.py` asks upstream, and serves what this module allows.
"""

import math
from enum import Enum


class Freshness(Enum):
    """How a cached answer may be used (RFC 9111, section 4.2; RFC 5861)."""

    FRESH = "fresh"
    # Served at once, and revalidated in the background.
    STALE_WHILE_REVALIDATE = "stale-while-revalidate"
    # Served only if upstream fails.
    STALE_IF_ERROR = "stale-if-error"
    # Not served even if upstream fails; while the cache is offline, it is.
    EXPIRED = "expired"


def is_fresh(age: float, ttl: float) -> bool:
    """Tell whether an answer of `age` seconds is served without asking upstream.

    A negative age means that the clock was set back: the true age is unknown, so the answer counts as
    stale rather than as fresh for ever, unless the tag never moves.
    """
    return 0 <= age < ttl or ttl == math.inf


def compute_freshness(
    age: float, *, ttl: float, stale_while_revalidate: float, stale_if_error: float
) -> Freshness:
    """Return how an answer of `age` seconds may be used.

    Both stale periods begin at the end of `ttl`.
    """
    if is_fresh(age, ttl):
        return Freshness.FRESH
    if 0 <= age < ttl + stale_while_revalidate:
        return Freshness.STALE_WHILE_REVALIDATE
    return Freshness.STALE_IF_ERROR if age < ttl + stale_if_error else Freshness.EXPIRED
