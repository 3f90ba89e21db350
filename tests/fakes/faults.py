"""What can go wrong with one answer of a fake server, declared; the fields combine."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """A distortion of an answer.

    Before the headers: `until_headers` holds them back, `hang_up` closes instead of answering.
    The answer itself: `status`, `body` and `headers` replace it (a header of None is left out),
    `ignore_range` answers 200 to a Range, `keep` leaves that many bytes and says so in
    Content-Length, `flip_at` turns one bit over, `send_length` False leaves Content-Length out.
    On the way: `stall_at` stops at that byte until `until` is set, `cut_at` closes there (with
    `reset` rudely), `rate` is bytes a second. Offsets count from the first byte of the body sent.
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
    """An answer before it is sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    """Content-Length of a HEAD, whose body is not sent."""

    def with_fault(self, fault: Fault) -> "Reply":
        """Return what this answer becomes under `fault`."""
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
    """A fault for the next `times` requests whose `METHOD target` holds `match`."""

    match: re.Pattern[str]
    fault: Fault
    times: int | None

    def take(self, line: str) -> bool:
        """Tell whether this rule is meant, and use it up by one."""
        if self.times == 0 or self.match.search(line) is None:
            return False
        if self.times is not None:
            self.times -= 1
        return True


def flip(content: bytes, offset: int) -> bytes:
    """Return `content` with one bit of the byte at `offset` turned over."""
    changed = bytearray(content)
    changed[offset] ^= 1
    return bytes(changed)
