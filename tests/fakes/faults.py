"""Faults of a fake server's responses, declared by fields that can be combined."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault of a response.

    - Before the headers: `until_headers` delays them until the event is set, `hang_up` closes the
      connection instead of responding.
    - The response itself: `status`, `body` and `headers` replace it (a header of None is omitted),
      `ignore_range` responds 200 to a Range, `keep` truncates the body and adapts Content-Length,
      `flip_at` flips one bit, `send_length=False` omits Content-Length.
    - During the body: `stall_at` stops at that byte until the event `until` is set, `cut_at` closes
      the connection there (with `reset` by RST), `rate` limits the bytes per second.

    Offsets count from the first byte of the body that is sent.
    """

    until_headers: asyncio.Event | None = None
    hang_up: bool = False
    status: int | None = None
    body: bytes | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    ignore_range: bool = False
    keep: int | None = None
    flip_at: int | None = None
    send_length: bool | None = None
    stall_at: int | None = None
    until: asyncio.Event | None = None
    cut_at: int | None = None
    reset: bool = False
    rate: int | None = None


HTML: Final = Fault(
    status=200,
    body=b"<!doctype html><title>Welcome to the hotel</title>",
    headers={
        "Content-Type": "text/html; charset=utf-8",
        "Docker-Content-Digest": None,
        "ETag": None,
    },
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response before it is sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    """Content-Length of a HEAD, whose body is not sent."""

    def with_fault(self, fault: Fault) -> "Reply":
        """Return this response with the fault applied."""
        headers = dict(self.headers)
        for name, value in fault.headers.items():
            headers.pop(name, None)
            if value is not None:
                headers[name] = value
        body = self.body if fault.body is None else fault.body
        if fault.keep is not None:
            body = body[: fault.keep]
        if fault.flip_at is not None:
            body = flip(body, fault.flip_at)
        status = self.status if fault.status is None else fault.status
        return replace(self, status=status, headers=headers, body=body)


@dataclass(slots=True)
class Rule:
    """A fault for the next `times` requests whose `METHOD target` matches; None: for all."""

    match: re.Pattern[str]
    fault: Fault
    times: int | None

    def applies_to(self, line: str) -> bool:
        """Tell whether the rule applies to a request, and count it down."""
        if self.times == 0 or self.match.search(line) is None:
            return False
        if self.times is not None:
            self.times -= 1
        return True


def flip(content: bytes, offset: int) -> bytes:
    """Return `content` with one bit of the byte at `offset` flipped."""
    changed = bytearray(content)
    changed[offset] ^= 1
    return bytes(changed)
