"""An upstream that serves blobs as far as a test lets it, and keeps a log of what it sent."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

CHUNK = 16 << 10
BLOB = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})(?:\?.*)?")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Transfer:
    """One answered request for a blob; `sent` grows while the body leaves."""

    method: str
    digest: str
    range: str
    status: int = 0
    sent: int = 0


@dataclass
class Blob:
    data: bytes
    hold_at: int | None = None  # bodies stop here, open, until released
    released: threading.Event = field(default_factory=threading.Event)


class BlobServer:
    """A read-only registry of blobs, under any repository's name."""

    def __init__(self) -> None:
        self.blobs: dict[str, Blob] = {}
        self.transfers: list[Transfer] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        for blob in self.blobs.values():
            blob.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, data: bytes, *, hold_at: int | None = None) -> str:
        """Offer `data`; with `hold_at`, no body goes beyond that offset before `release`."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = Blob(data, hold_at)
        return digest

    def corrupt(self, digest: str) -> None:
        """Flip one bit in the middle of what is sent under `digest` from now on."""
        blob = self.blobs[digest]
        middle = len(blob.data) // 2
        flipped = bytes([blob.data[middle] ^ 1])
        blob.data = blob.data[:middle] + flipped + blob.data[middle + 1 :]

    def release(self, digest: str) -> None:
        self.blobs[digest].released.set()

    def gets(self, digest: str) -> list[Transfer]:
        return [t for t in self.transfers if (t.method, t.digest) == ("GET", digest)]

    def sent(self) -> int:
        """Return how many bytes of bodies have left so far."""
        return sum(transfer.sent for transfer in self.transfers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: BlobServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """Keep the test's output to itself: the transfers are the log."""

    def _answer(self) -> None:
        owner = cast("_Server", self.server).owner
        match = BLOB.fullmatch(self.path)
        blob = owner.blobs.get(match[1]) if match else None
        if not match or not blob:
            found = self.path == "/v2/"
            self._headers(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, 0)
            return
        transfer = Transfer(self.command, match[1], self.headers.get("Range", ""))
        owner.transfers.append(transfer)
        try:
            self._send(blob, transfer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, blob: Blob, transfer: Transfer) -> None:
        total = len(blob.data)
        start, stop = 0, total
        if wanted := RANGE.fullmatch(transfer.range):
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1 if wanted[2] else total, total)
        transfer.status = HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK
        extra = {"Content-Range": f"bytes {start}-{stop - 1}/{total}"} if wanted else {}
        self._headers(transfer.status, stop - start, extra)
        if self.command == "GET":
            self._send_body(blob, transfer, start, stop)

    def _send_body(self, blob: Blob, transfer: Transfer, start: int, stop: int) -> None:
        offset = start
        while offset < stop:
            end = min(offset + CHUNK, stop)
            if blob.hold_at is not None and end > blob.hold_at:
                blob.released.wait()
            self.wfile.write(blob.data[offset:end])
            transfer.sent += end - offset
            offset = end

    def _headers(self, status: int, length: int, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
