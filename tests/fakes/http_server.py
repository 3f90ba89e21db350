"""A real HTTP server on loopback that logs its requests and fails on demand."""

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web
from multidict import CIMultiDictProxy

from tests.fakes.faults import CHUNK, Fault, Reply, Rule
from tests.fakes.startable import Startable
from tests.support.ports import reserve_port

# Seconds to wait for the program.
TIMEOUT: Final = 20.0
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(slots=True)
class ReceivedRequest:
    """A request that a fake server received; `status` and after are set while it responds."""

    server: str
    method: str
    target: str
    """Path and query, exactly as received."""
    headers: CIMultiDictProxy[str]
    peer: tuple[str, int]
    status: int = 0
    bytes_sent: int = 0
    done: bool = False

    @property
    def line(self) -> str:
        """The text that patterns are matched against."""
        return f"{self.method} {self.target}"


class RequestLog:
    """All requests in the order of arrival, and a way to wait for more."""

    def __init__(self) -> None:
        self.requests: list[ReceivedRequest] = []
        self.errors: list[Exception] = []
        self._change = asyncio.Event()

    def changed(self) -> None:
        """Wake the waiters in `until`."""
        self._change.set()
        self._change = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true; it is evaluated whenever a fake receives or sends."""
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                await self._change.wait()

    def seen(self, match: str = "") -> list[ReceivedRequest]:
        """Return the requests whose `METHOD target` matches the regular expression."""
        return [one for one in self.requests if re.search(match, one.line)]

    def count(self, match: str = "") -> int:
        """Return the number of matching requests."""
        return len(self.seen(match))

    def bytes_sent(self, match: str = "") -> int:
        """Return the body bytes sent for matching requests."""
        return sum(one.bytes_sent for one in self.seen(match))


class FakeServer(Startable):
    """A server on one port. `answer` makes correct responses, to which it applies the faults."""

    def __init__(
        self, name: str, answer: Callable[[web.BaseRequest], Reply], log: RequestLog
    ) -> None:
        self.name = name
        self.log = log
        self.rules: list[Rule] = []
        self.rate: int | None = None
        self.send_length = True
        self.accept_ranges = True
        self.port = reserve_port(self)
        self.tls: ssl.SSLContext | None = None
        self._answer = answer
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, always on the same port."""
        server = web.Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            max_line_size=65536,
            max_field_size=65536,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.01)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        await web.SockSite(self._runner, listener, ssl_context=self.tls).start()

    async def stop(self) -> None:
        """Stop listening, and close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        seen = ReceivedRequest(
            server=self.name,
            method=request.method,
            target=request.raw_path,
            headers=request.headers,
            peer=request.transport.get_extra_info("peername"),
        )
        self.log.requests.append(seen)
        self.log.changed()
        try:
            return await self._respond(request, seen)
        except ConnectionError:
            return web.StreamResponse()  # the client has closed the connection
        except Exception as error:  # a bug of the fake, raised by `FakeRegistry` at its end
            self.log.errors.append(error)
            raise
        finally:
            seen.done = True
            self.log.changed()

    async def _respond(self, request: web.BaseRequest, seen: ReceivedRequest) -> web.StreamResponse:
        fault = next((rule.fault for rule in self.rules if rule.applies_to(seen.line)), Fault())
        if fault.until_headers is not None:
            await fault.until_headers.wait()
        response = web.StreamResponse()
        if fault.hang_up:
            _close(request, reset=fault.reset)
            return response
        reply = self._answer(request)
        if self.accept_ranges and not fault.ignore_range and fault.status is None:
            reply = in_range(reply, request)
        reply = reply.with_fault(fault)
        seen.status = reply.status
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        has_length = self.send_length if fault.send_length is None else fault.send_length
        if request.method == "HEAD":
            response.content_length = len(reply.body) if reply.length is None else reply.length
        elif not has_length:
            response.enable_chunked_encoding()
        elif "Content-Length" not in reply.headers:
            response.content_length = len(reply.body)
        await response.prepare(request)
        if request.method != "HEAD":
            await self._send(request, response, seen, reply.body, fault)
        return response

    async def _send(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        seen: ReceivedRequest,
        body: bytes,
        fault: Fault,
    ) -> None:
        rate = fault.rate or self.rate
        chunk = min(CHUNK, max(1, rate // 20)) if rate else CHUNK
        view = memoryview(body)
        offset = 0
        while True:
            if offset == fault.stall_at and fault.until is not None:
                await fault.until.wait()
            if offset == fault.cut_at:
                _close(request, reset=fault.reset)
                return
            if offset >= len(body):
                return
            breaks = [at for at in (fault.cut_at, fault.stall_at) if at is not None and at > offset]
            end = min(offset + chunk, len(body), *breaks)
            await response.write(view[offset:end])
            seen.bytes_sent += end - offset
            self.log.changed()
            if rate:
                await asyncio.sleep((end - offset) / rate)
            offset = end


def in_range(reply: Reply, request: web.BaseRequest) -> Reply:
    """Return the part of a 200 `reply` to a GET that its Range header selects."""
    requested = _RANGE.fullmatch(request.headers.get("Range", ""))
    if requested is None or reply.status != 200 or request.method != "GET":
        return reply
    condition = request.headers.get("If-Range")
    if condition is not None and condition != reply.headers.get("ETag"):
        return reply
    size = len(reply.body)
    first, last = requested.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        headers = {**reply.headers, "Content-Range": f"bytes */{size}"}
        return replace(reply, status=416, headers=headers, body=b"")
    headers = {**reply.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return replace(reply, status=206, headers=headers, body=reply.body[start:stop])


def _close(request: web.BaseRequest, *, reset: bool) -> None:
    transport = request.transport
    if transport is None:
        return
    if reset:
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        transport.abort()
    else:
        transport.close()
