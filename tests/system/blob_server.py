"""An upstream that sends a blob only as far as a test allows, and records its responses."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

CHUNK_SIZE = 16 << 10
BLOB_PATH = re.compile(r"/v2/.+/blobs/(sha256:[0-9a-f]{64})(?:\?.*)?")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class BlobResponse:
    """A response to one request for a blob; `sent` grows while the body is sent."""

    method: str
    digest: str
    range: str
    status: int = 0
    sent: int = 0


@dataclass
class ServedBlob:
    data: bytes
    hold_at: int | None = None  # bodies pause at this offset until `released` is set
    released: threading.Event = field(default_factory=threading.Event)


class BlobServer:
    """A read-only registry that serves its blobs in every repository."""

    def __init__(self) -> None:
        self.blobs: dict[str, ServedBlob] = {}
        self.responses: list[BlobResponse] = []
        self._server = _Server(("127.0.0.1", 0), _BlobHandler)
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
        """Serve `data` and return its digest. Bodies pause at the offset `hold_at` until `release`."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = ServedBlob(data, hold_at)
        return digest

    def corrupt(self, digest: str) -> None:
        """Flip one bit in the middle of the blob's data from now on."""
        blob = self.blobs[digest]
        middle = len(blob.data) // 2
        flipped = bytes([blob.data[middle] ^ 1])
        blob.data = blob.data[:middle] + flipped + blob.data[middle + 1 :]

    def release(self, digest: str) -> None:
        self.blobs[digest].released.set()

    def responses_to_get(self, digest: str) -> list[BlobResponse]:
        return [one for one in self.responses if (one.method, one.digest) == ("GET", digest)]

    def bytes_sent(self) -> int:
        """Return how many bytes of bodies have been sent so far."""
        return sum(response.sent for response in self.responses)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: BlobServer


class _BlobHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._respond()

    def do_GET(self) -> None:
        self._respond()

    def log_message(self, *args: object) -> None:
        """Print nothing: tests read `BlobServer.responses`."""

    def _respond(self) -> None:
        owner = cast("_Server", self.server).owner
        match = BLOB_PATH.fullmatch(self.path)
        blob = owner.blobs.get(match[1]) if match else None
        if not match or not blob:
            is_base = self.path == "/v2/"
            self._send_head(HTTPStatus.OK if is_base else HTTPStatus.NOT_FOUND, 0)
            return
        response = BlobResponse(self.command, match[1], self.headers.get("Range", ""))
        owner.responses.append(response)
        try:
            self._send(blob, response)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, blob: ServedBlob, response: BlobResponse) -> None:
        size = len(blob.data)
        start, stop = 0, size
        if requested := RANGE.fullmatch(response.range):
            start = int(requested[1])
            stop = min(int(requested[2]) + 1 if requested[2] else size, size)
        response.status = HTTPStatus.PARTIAL_CONTENT if requested else HTTPStatus.OK
        extra = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if requested else {}
        self._send_head(response.status, stop - start, extra)
        if self.command == "GET":
            self._send_body(blob, response, start, stop)

    def _send_body(self, blob: ServedBlob, response: BlobResponse, start: int, stop: int) -> None:
        offset = start
        while offset < stop:
            end = min(offset + CHUNK_SIZE, stop)
            if blob.hold_at is not None and end > blob.hold_at:
                blob.released.wait()
            self.wfile.write(blob.data[offset:end])
            response.sent += end - offset
            offset = end

    def _send_head(self, status: int, length: int, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
