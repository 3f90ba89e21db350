"""Parse what Docker Hub's own API says about repositories and tags. Pure.

The API (`/api/search/v4` and `/v2/namespaces`) is not the registry's. Parts of it are undocumented and
change, so each field may be missing, null or of another type, and then counts as not said.
"""

import re
from calendar import timegm
from collections.abc import Iterator
from typing import Any

import msgspec

from proxy.errors import InvalidDigestError, UpstreamError
from proxy.oci.digest import Digest
from proxy.policy.facts import Badge
from proxy.upstream.search import SearchHit, SearchPage, clamp_count, is_valid_name, sanitize_text

# Docker Hub's own names of the badges.
BADGE_NAMES = {
    Badge.OFFICIAL: "official",
    Badge.VERIFIED_PUBLISHER: "verified_publisher",
    Badge.SPONSORED: "open_source",
}
_BADGES = {name: badge for badge, name in BADGE_NAMES.items()} | {
    "none": Badge.COMMUNITY,
    "": Badge.COMMUNITY,
    None: Badge.COMMUNITY,
}
# Docker Hardened Images have repositories that cannot be pulled from Docker Hub.
_HARDENED_BADGE = "dhi"

_COUNT = re.compile(r"([0-9]{1,15})(?:\.[0-9]*)?([KMB]?)\+?")
_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.[0-9]+)?"
    r"(?:Z|([+-])([0-9]{2}):([0-9]{2}))"
)


def parse_search(content: bytes) -> SearchPage:
    """Return one page of `/api/search/v4`. Official images are named without `library/`.

    Leaves out what cannot be pulled: extensions, hardened images, invalid names. Raises
    `UpstreamError` if the content is not such a page.
    """
    document = _decode(content)
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list):
        raise UpstreamError("Docker Hub sent an invalid search response")
    hits = list(_iter_hits(results))
    return SearchPage(hits, clamp_count(_to_count(document.get("total")), len(hits)))


def find_repository(page: SearchPage, name: str) -> SearchHit | None:
    """Return the result for exactly this repository; `name` may start with `library/`."""
    wanted = name.removeprefix("library/")
    return next((hit for hit in page.results if hit.name == wanted), None)


def parse_push_times(content: bytes) -> dict[Digest, float]:
    """Return when the content of a tag was pushed, by digest, in Unix seconds.

    The digests are those of the tag and of its platforms. Those of which Docker Hub does not say
    when are left out. Raises `UpstreamError` if the content is not about a tag.
    """
    document = _decode(content)
    if not isinstance(document, dict):
        raise UpstreamError("Docker Hub sent an invalid response about a tag")
    images = document.get("images")
    entries = [(document.get("digest"), document.get("tag_last_pushed"))]
    entries += [
        (image.get("digest"), image.get("last_pushed"))
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict)
    ]
    pushed: dict[Digest, float] = {}
    for digest, time in entries:
        parsed, seconds = _to_digest(digest), _to_unix_time(time)
        if parsed and seconds is not None:
            pushed.setdefault(parsed, seconds)
    return pushed


def _iter_hits(results: list[Any]) -> Iterator[SearchHit]:
    for result in results:
        if not isinstance(result, dict):
            continue
        badge = result.get("badge", False)
        name = _to_text(result.get("name") or result.get("id")).removeprefix("library/")
        if (
            result.get("type", "image") != "image"
            or badge == _HARDENED_BADGE
            or not is_valid_name(name)
        ):
            continue
        publisher = result.get("publisher")
        known = _BADGES.get(badge) if badge is None or isinstance(badge, str) else None
        yield SearchHit(
            name,
            sanitize_text(_to_text(result.get("short_description"))),
            clamp_count(_to_count(result.get("star_count")), 0),
            "/" not in name,
            Badge.OFFICIAL if "/" not in name else known or Badge.NO_ANSWER,
            sanitize_text(_to_text(publisher.get("name"))) if isinstance(publisher, dict) else "",
            _to_count(result.get("raw_pull_count")) or _to_count(result.get("pull_count")),
            result.get("archived") is True,
        )


def _decode(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UpstreamError("Docker Hub sent no JSON") from error


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _to_count(value: Any) -> int:
    """Return a count that is a number or text such as `12`, `1.5K` or `1B+`; otherwise 0."""
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        return int(match[1]) * _COUNT_UNITS[match[2]]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return max(0, int(value)) if is_number and abs(value) < 1 << 60 else 0


def _to_digest(value: Any) -> Digest | None:
    try:
        return Digest.parse(_to_text(value))
    except InvalidDigestError:
        return None


def _to_unix_time(value: Any) -> float | None:
    """Return the Unix time of an RFC 3339 text, None if it is not one."""
    match = _TIME.fullmatch(_to_text(value))
    if match is None:
        return None
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    offset = int(f"{match[7]}1") * (int(match[8]) * 3600 + int(match[9]) * 60) if match[7] else 0
    if not (year >= 2000 and 1 <= month <= 12 and 1 <= day <= 31):
        return None
    return float(timegm((year, month, day, hour, minute, second)) - offset)
