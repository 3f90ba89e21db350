"""Ranges and conditions of a request (RFC 9110 sections 13 and 14). Pure."""

import re
from dataclasses import dataclass

# A request for more ranges gets the whole content. podman requests up to 1024 chunks of a layer at once.
MAX_RANGES = 1024

_UNIT = re.compile(r"[ \t]*bytes=", re.IGNORECASE)
_RANGE = re.compile(r"[ \t]*(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))[ \t]*")
_ETAG = re.compile(r'"[^"]*"')


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes `start` up to but not including `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """The number of bytes in the range."""
        return self.stop - self.start


class RangeNotSatisfiableError(Exception):
    """None of the ranges has a byte of the content: 416."""


def parse_ranges(value: str | None, size: int) -> list[ByteRange]:
    """Return the ranges that a `Range` header selects of content of `size` bytes, in its order.

    Ranges beyond the end are left out. No range means the whole content: the header is absent, of
    another unit or malformed, or asks for more ranges than `MAX_RANGES` or for more bytes than the
    content has, all of which a server may ignore (RFC 9110 section 14.2).
    Raises `RangeNotSatisfiableError`.
    """
    if not value or (unit := _UNIT.match(value)) is None:
        return []
    specs = value[unit.end() :].split(",", MAX_RANGES)
    asked = [_parse_range(spec, size) for spec in specs if spec.strip(" \t")]
    if not asked or len(specs) > MAX_RANGES or None in asked:
        return []
    selected = [one for one in asked if one and one.length > 0]
    if not selected:
        raise RangeNotSatisfiableError
    is_too_much = len(selected) > 1 and sum(one.length for one in selected) > size
    return [] if is_too_much else selected


def _parse_range(spec: str, size: int) -> ByteRange | None:
    """Return one range, which has no byte if it lies beyond the end; None if it is malformed."""
    match = _RANGE.fullmatch(spec)
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        return ByteRange(max(0, size - int(suffix)), size)
    if last and int(last) < int(first):
        return None
    return ByteRange(int(first), min(size, int(last) + 1) if last else size)


def is_if_range_match(if_range: str | None, etag: str) -> bool:
    """Tell whether `If-Range` lets the range be served: absent, or strongly equal to `etag`."""
    return if_range is None or if_range.strip() == etag


def is_not_modified(if_none_match: str | None, etag: str) -> bool:
    """Tell whether `If-None-Match` names `etag` (weak comparison), so that 304 is the answer.

    An unquoted digest matches too, as in distribution. A list of any length takes one pass.
    """
    if if_none_match is None:
        return False
    value = if_none_match.strip()
    return value in ("*", etag.strip('"')) or etag in _ETAG.findall(value)
