"""The client of the admin API: what every command but `serve`, `config` and `fsck` works through.

    with admin_api(load_config(path, store)) as api:
        print(api.get("/api/v1/status")["state"])
        for event in api.stream("POST", "/api/v1/preload", {"images": ["alpine"]}):
            ...

It asks the daemon on the store. If there is none, the command is the daemon for as long as the block lasts: the same
program on the same store, without any TCP port (`proxy/cli/private.py`). How an operation is added is told in
`proxy/server/api.py`. Plain blocking HTTP of the standard library, so that a command need not wait for aiohttp's import.
"""

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

from proxy.config import Config
from proxy.errors import DaemonUnavailableError, ProxyError, error_from_code

SOCKET_NAME = "admin.sock"
CHUNK_SIZE = 1 << 18

UploadBody = Iterable[bytes] | BinaryIO


@contextmanager
def open_admin_client(
    config: Config, *, allow_embedded: bool = True, timeout: float | None = None
) -> Iterator["AdminClient"]:
    """Yield the API of the daemon on `config.store.path`, or of a private one if none answers.

    With `private=False` a missing daemon is a `DaemonError`. `timeout` is how long, in seconds, the daemon may say
    nothing. Raises `StorageError` if the store is in use by a process that has no socket.
    """
    with ExitStack() as stack:
        if not _is_daemon_listening(config.store.path):
            if not allow_embedded:
                raise DaemonUnavailableError(
                    f"no daemon answers on {config.store.path}/{SOCKET_NAME}"
                )
            from proxy.cli.embedded_daemon import embedded_daemon  # noqa: PLC0415 - brings aiohttp

            stack.enter_context(embedded_daemon(config))
        yield AdminClient(config.store.path, timeout)


class AdminClient:
    """Asks the daemon on the store at `root`. Errors of the API are raised as what they were there."""

    def __init__(self, store_path: Path, timeout: float | None = None) -> None:
        self._store_path = store_path
        self._timeout = timeout

    def get(self, path: str, **query: object) -> Any:
        """Return the document at `path`. A value that is None is not sent; True is `true`."""
        return self._request_document("GET", path, None, query)

    def post(self, path: str, document: object = None, **query: object) -> Any:
        """Send a document; return the answer's, or None."""
        return self._request_document("POST", path, document, query)

    def put(self, path: str, document: object, **query: object) -> Any:
        """Send a document to replace what is at `path`; return the answer's, or None."""
        return self._request_document("PUT", path, document, query)

    def delete(self, path: str, **query: object) -> Any:
        """Delete what is at `path`; return the answer's document, or None."""
        return self._request_document("DELETE", path, None, query)

    def stream(
        self,
        method: str,
        path: str,
        document: object = None,
        *,
        upload: UploadBody | None = None,
        **query: object,
    ) -> Iterator[Any]:
        """Yield the events of a long operation as they happen; an error among them is raised.

        `upload`, a file or pieces of bytes, is sent as the body meanwhile. Not going on ends the operation.
        """
        with self._request(method, path, document, query, upload) as response:
            for line in _iter_lines(response):
                event = json.loads(line)
                if isinstance(event, dict) and event.keys() == {"error"}:
                    raise error_from_code(**event["error"])
                yield event

    def post_to_file(self, path: str, document: object, file: BinaryIO, **query: object) -> int:
        """POST, write the bytes of the answer to `target`, and return how many they were."""
        with self._request("POST", path, document, query) as response:
            return sum(map(file.write, _iter_body(response)))

    def is_ready(self) -> bool:
        """Tell whether the daemon can serve."""
        with suppress(ProxyError), self._request("GET", "/readyz", None, {}):
            return True
        return False

    def _request_document(
        self, method: str, path: str, document: object, query: Mapping[str, object]
    ) -> Any:
        with self._request(method, path, document, query) as response:
            content = b"".join(_iter_body(response))
            return json.loads(content) if content else None

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        document: object,
        query: Mapping[str, object],
        upload: UploadBody | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield a good answer, its body still to be read."""
        with ExitStack() as stack:
            with _map_errors():
                connection = stack.enter_context(_connect(self._store_path, self._timeout))
                connection.sendall(_encode_head(method, path, document, query, upload))
            sending = _UploadThread(connection, upload) if upload is not None else None
            try:
                with _map_errors():
                    # A reference to the connection, which stays open as long as this does.
                    response = http.client.HTTPResponse(connection, method=method)
                    stack.callback(response.close)
                    response.begin()
                if response.status >= 400:
                    raise _read_error(response)
                yield response
            except DaemonUnavailableError as error:
                if sending and sending.error:
                    raise sending.error from error
                raise


class _UploadThread:
    """Sends a body in chunks, in a thread: the daemon tells of what it has while more is on its way.

    `error` is what went wrong with the source; its body is then cut, lest the daemon take it for whole.
    """

    def __init__(self, connection: socket.socket, upload: UploadBody) -> None:
        self.error: Exception | None = None
        self._connection = connection
        self._chunks = _iter_chunks(upload)
        threading.Thread(target=self._send, name="upload", daemon=True).start()

    def _send(self) -> None:
        # A daemon that reads no further has answered, and the answer says why.
        with suppress(OSError):
            for piece in self._read_chunks():
                self._connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            if self.error:
                self._connection.shutdown(socket.SHUT_RDWR)
            else:
                self._connection.sendall(b"0\r\n\r\n")

    def _read_chunks(self) -> Iterator[bytes]:
        try:
            yield from self._chunks
        except Exception as error:  # noqa: BLE001 (raised again by who reads the answer)
            self.error = error


def _iter_chunks(upload: UploadBody) -> Iterator[bytes]:
    read = getattr(upload, "read", None)  # a file, whose lines would be pieces of any length
    return iter(partial(read, CHUNK_SIZE), b"") if read else filter(None, upload)


def _encode_head(
    method: str,
    path: str,
    document: object,
    query: Mapping[str, object],
    upload: UploadBody | None,
) -> bytes:
    """Return the request line, the headers, and the body if it is a document."""
    given = {name: _format_query_value(value) for name, value in query.items() if value is not None}
    target = f"{path}?{urlencode(given)}" if given else path
    headers = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json"}
    body = b"" if document is None else json.dumps(document).encode()
    if upload is None:
        headers["Content-Length"] = str(len(body))
    else:
        headers |= {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {text}" for name, text in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _format_query_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _iter_body(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes. `read1` is the one way to read that tells a short body from a whole one."""
    while True:
        with _map_errors():
            piece = response.read1(CHUNK_SIZE)
            if not piece and response.length:
                raise http.client.IncompleteRead(b"", response.length)
        if not piece:
            return
        yield piece


def _iter_lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    left = b""
    for piece in _iter_body(response):
        *lines, left = (left + piece).split(b"\n")
        yield from lines


def _read_error(response: http.client.HTTPResponse) -> ProxyError:
    content = b"".join(_iter_body(response))
    try:
        error = json.loads(content)["error"]
        return error_from_code(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return ProxyError(
            f"the daemon answered {response.status}: {content[:100].decode(errors='replace')}"
        )


@contextmanager
def _map_errors() -> Iterator[None]:
    """Turn what becomes of a daemon that ends, or says nothing, into a `DaemonError`."""
    try:
        yield
    except TimeoutError as error:
        raise DaemonUnavailableError("the daemon does not answer in time") from error
    except (http.client.HTTPException, ConnectionError, FileNotFoundError) as error:
        raise DaemonUnavailableError(
            "the daemon ended before it was done; run the command again"
        ) from error


@contextmanager
def _connect(store_path: Path, timeout: float | None = None) -> Iterator[socket.socket]:
    """Yield a connection to the daemon's socket. Raises `OSError`."""
    # By way of the directory's descriptor: a socket's address holds 107 bytes, a path more.
    directory = os.open(store_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, directory)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(timeout)
        connection.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        yield connection


def _is_daemon_listening(store_path: Path) -> bool:
    """Tell whether a daemon listens. Raises `DaemonError` if there is one that we may not ask."""
    try:
        with _connect(store_path):
            return True
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise DaemonUnavailableError(
            f"{store_path}/{SOCKET_NAME} may not be used; run this as the daemon's user, or as root"
        ) from error
