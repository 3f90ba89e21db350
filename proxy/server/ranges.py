"""Ranges and conditions of a request (RFC 9110 sections 13 and 14). PURE."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))", re.IGNORECASE)
_ETAG = re.compile(r'"[^"]*"')


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes `start` up to but not including `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes these are."""
        return self.stop - self.start


class RangeNotSatisfiableError(Exception):
    """No byte of the content lies in the range: 416."""


def parse_range(value: str | None, size: int) -> ByteRange | None:
    """Return the window that a `Range` header asks of content of `size` bytes.

    None means the whole: no header, another unit, malformed, or several ranges, all of which a
    server may ignore (RFC 9110 section 14.2). Raises `Unsatisfiable`.
    """
    match = _RANGE.fullmatch((value or "").strip())
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        window = ByteRange(max(0, size - int(suffix)), size)
    else:
        window = ByteRange(int(first), min(size, int(last) + 1) if last else size)
        if last and int(last) < int(first):
            return None
    if window.length <= 0:
        raise RangeNotSatisfiableError
    return window


def is_if_range_match(if_range: str | None, etag: str) -> bool:
    """Tell whether `If-Range` lets the range be served: absent, or strongly equal to `etag`."""
    return if_range is None or if_range.strip() == etag


def is_not_modified(if_none_match: str | None, etag: str) -> bool:
    """Tell whether `If-None-Match` names `etag` (weak comparison), so that 304 is the answer.

    An unquoted digest matches too, as in distribution. Lists of any length cost one pass.
    """
    if if_none_match is None:
        return False
    value = if_none_match.strip()
    return value in ("*", etag.strip('"')) or etag in _ETAG.findall(value)
