"""Responses as handlers return them, and their heads as they are sent (RFC 9112 section 4)."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

import msgspec

from proxy.server.ranges import ByteRange
from proxy.server.request import Request
from proxy.storage.blobs import FileRange, OpenBlob

API_VERSION = "registry/2.0"

_STATUS_LINES: Mapping[int, bytes] = {
    one.value: f"HTTP/1.1 {one.value} {one.phrase}\r\n".encode() for one in HTTPStatus
}


class BodySource(Protocol):
    """The source of a blob's bytes."""

    async def next(self, offset: int, stop: int = sys.maxsize) -> memoryview | FileRange:
        """Return bytes from `offset` up to `stop` at most that may be sent; wait until there are any.

        A `memoryview` is valid until the caller awaits anything; an empty one marks the end of a blob of
        unknown size. Raises `ProxyError` if the body must be cut short.
        """


class Body(msgspec.Struct):
    """A body that is sent as it arrives: ranges of `source`, and bytes between them.

    `length` is None if unknown; the body is then the whole source, in chunks. `resources` are closed
    after the response.
    """

    length: int | None
    segments: Sequence[bytes | ByteRange]
    source: BodySource
    resources: AsyncExitStack


class FileBody(msgspec.Struct):
    """A body that is a whole stored blob, which is closed after the response."""

    blob: OpenBlob

    @property
    def length(self) -> int:
        """The number of bytes."""
        return self.blob.size

    def range_from(self, offset: int) -> FileRange:
        """Return the range of the file from `offset` to its end."""
        return FileRange(self.blob.fd, offset, self.blob.size)


class Response(msgspec.Struct):
    """A response of a handler.

    `on_end` is called once, with the number of body bytes sent and the error that cut the body, or None.
    `reason` stands in the status line in place of the status's own phrase; characters that are not printable
    ASCII become `?`.
    """

    status: int = 200
    headers: dict[str, str] = {}
    body: bytes | Body | FileBody = b""
    should_close: bool = False
    on_end: Callable[[int, Exception | None], None] | None = None
    reason: str = ""

    def end(self, sent: int, error: Exception | None) -> None:
        """Report that the response has ended."""
        if self.on_end:
            on_end, self.on_end = self.on_end, None
            on_end(sent, error)


class SharedHeaders(dict[str, str]):
    """Headers shared by responses with the same status and length. They must not change any more.

    `head` is the head of these responses in the second `head_time`, in which the last of them was sent.
    """

    __slots__ = ("head", "head_time")
    head: bytes
    head_time: int

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> "SharedHeaders":
        """Return a copy of `headers`."""
        shared = cls(headers)
        shared.head, shared.head_time = b"", 0
        return shared


def serialize_head(request: Request | None, response: Response, *, is_last: bool) -> bytes:
    """Return status line and headers of a response; `request` is None if it did not parse.

    Raises `ValueError` if a header contains a line break.
    """
    headers = response.headers
    if type(headers) is not SharedHeaders or is_last or request is None or request.is_http_1_0:
        return _serialize(request, response, is_last=is_last)
    now = int(time.time())
    if headers.head_time != now:
        headers.head, headers.head_time = _serialize(request, response, is_last=False), now
    return headers.head


def _serialize(request: Request | None, response: Response, *, is_last: bool) -> bytes:
    headers = response.headers
    encoded = _encode_headers(headers)
    length_line = b""
    if response.status != 304 and "Content-Length" not in headers:
        body = response.body
        length = len(body) if type(body) is bytes else body.length  # type: ignore[union-attr]
        if length is None:
            length_line = b"Transfer-Encoding: chunked\r\n"
        elif length or request is None or request.method != "HEAD":
            # For HEAD, an empty body does not give the length that GET would have.
            length_line = b"Content-Length: %d\r\n" % length
    connection = b""
    if is_last:
        connection = b"Connection: close\r\n"
    elif request and request.is_http_1_0:
        connection = b"Connection: keep-alive\r\n"
    status_line = _STATUS_LINES[response.status]
    if response.reason:
        phrase = "".join(char if " " <= char <= "~" else "?" for char in response.reason)
        status_line = f"HTTP/1.1 {response.status} {phrase}\r\n".encode()
    return b"".join((status_line, encoded, length_line, _date_and_server(), connection, b"\r\n"))


def _encode_headers(headers: Mapping[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines):
        raise ValueError("a response header contains a line break")
    return text.encode("latin-1")


_date_lines = b""
_date_second = 0


def _date_and_server() -> bytes:
    """Return the lines that every response has; the date is formatted once a second."""
    global _date_lines, _date_second  # noqa: PLW0603 (a cache of one value)
    now = int(time.time())
    if now != _date_second:
        _date_second = now
        _date_lines = (
            f"Date: {formatdate(now, usegmt=True)}\r\nServer: pullcache\r\n"
            "X-Content-Type-Options: nosniff\r\n"
        ).encode()
    return _date_lines


def json_response(
    document: object,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a JSON response with the headers of every registry response."""
    content = msgspec.json.encode(document)
    return encoded_response(content, status=status, content_type=content_type, headers=headers)


def encoded_response(
    content: bytes,
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response with a document that is encoded already; see `json_response`."""
    return Response(
        status,
        {
            "Docker-Distribution-Api-Version": API_VERSION,
            **(headers or {}),
            "Content-Type": content_type,
        },
        content,
    )


def text_response(text: str, status: int = 200) -> Response:
    """Return a response of plain text."""
    return Response(status, {"Content-Type": "text/plain; charset=utf-8"}, text.encode())
