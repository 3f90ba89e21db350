"""What may be asked, how long an answer is fresh, what a client takes. PURE.

Every function is given its facts, the time included, and answers from them alone.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from fnmatch import fnmatchcase


class Freshness(Enum):
    """How an answer that was remembered may be used (RFC 9111 section 4.2, RFC 5861)."""

    FRESH = "fresh"
    # Served at once, and asked again behind the client's back.
    STALE_WHILE_REVALIDATE = "stale-while-revalidate"
    STALE_IF_ERROR = "stale"
    # Too old to be served, even when upstream fails.
    EXPIRED = "dead"


def tag_ttl(tag: str, rules: Mapping[str, float], default: float) -> float:
    """Return the seconds for which `tag` stays fresh: the first glob that matches decides."""
    return next((ttl for glob, ttl in rules.items() if fnmatchcase(tag, glob)), default)


def compute_freshness(
    age: float, *, ttl: float, stale_while_revalidate: float, stale_if_error: float
) -> Freshness:
    """Judge an answer of `age` seconds.

    It is fresh for `ttl`, then served while being asked again for `revalidate`, and instead of an
    error for `stale`, each counted from the end of `ttl`. A negative age means that the clock was
    turned back: nothing is known, so it is stale, not fresh for ever.
    """
    if 0 <= age < ttl:
        return Freshness.FRESH
    if 0 <= age < ttl + stale_while_revalidate:
        return Freshness.STALE_WHILE_REVALIDATE
    return Freshness.STALE_IF_ERROR if age < ttl + stale_if_error else Freshness.EXPIRED


def accepts(accept: Iterable[str], media_type: str) -> bool:
    """Tell whether a client with these `Accept` header lines takes `media_type`.

    No header takes everything; so do the wildcards, which every client of the containerd family
    sends. Quality values are not weighed, as in distribution, but 0 refuses (RFC 9110 12.5.1).
    """
    lines = list(accept)
    if media_type in lines:
        return True
    wanted = {media_type, "application/*", "*/*"}
    for item in ",".join(lines).lower().split(","):
        name, _, parameters = item.partition(";")
        quality = parameters.strip().removeprefix("q=")
        if name.strip() in wanted and quality not in ("0", "0.0", "0.00", "0.000"):
            return True
    return not any(line.strip() for line in lines)
