"""The client of the admin API, which every command except `serve`, `config` and `fsck` uses.

    with open_client(path, store) as api:  # of `proxy/cli/options.py`
        print(api.get("/api/v1/status")["state"])
        for event in api.stream("POST", "/api/v1/preload", {"images": ["alpine"]}):
            ...

It connects to the daemon on the store. If none is running, the command runs one itself for the
duration of the block, without any TCP port (`proxy/cli/embedded_daemon.py`), and makes the store
only if it fills it. How to add an operation is described in `proxy/server/admin/api.py`. The HTTP client is the blocking one of the
standard library, because importing aiohttp would delay every command.
"""

import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

from proxy.config import Config
from proxy.errors import (
    DaemonUnavailableError,
    ProxyError,
    StoreNotFoundError,
    error_from_code,
)

SOCKET_NAME = "admin.sock"
CHUNK_SIZE = 1 << 18

UploadBody = Iterable[bytes] | BinaryIO


@contextmanager
def open_admin_client(
    config: Config,
    *,
    allow_embedded: bool = True,
    creates_store: bool = False,
    timeout: float | None = None,
    on_embed: Callable[[], None] = lambda: None,
) -> Iterator["AdminClient"]:
    """Yield a client of the daemon on `config.store.path`; embed a daemon if none is running.

    Calls `on_embed` before it embeds one. `timeout` limits how long the daemon may be silent, in
    seconds. Raises `DaemonUnavailableError` if no daemon is running and `allow_embedded` is False,
    or if another process has locked the store without listening; `StoreNotFoundError` if there is
    no store, unless the command `creates_store`.
    """
    with ExitStack() as stack:
        if not _is_daemon_listening(config.store.path):
            if not allow_embedded:
                raise DaemonUnavailableError(
                    f"no daemon is listening on {config.store.path}/{SOCKET_NAME}"
                )
            if not creates_store and not has_store(config.store.path):
                raise StoreNotFoundError(store_not_found_message(config.store.path))
            on_embed()
            from proxy.cli.embedded_daemon import embedded_daemon  # noqa: PLC0415 - imports aiohttp

            stack.enter_context(embedded_daemon(config))
        yield AdminClient(config.store.path, timeout)


class AdminClient:
    """Sends requests to the daemon on a store, one connection each.

    Errors arrive as the class that the daemon raised; `DaemonUnavailableError` means that it
    stopped or did not respond in time.
    """

    def __init__(self, store_path: Path, timeout: float | None = None) -> None:
        self._store_path = store_path
        self._timeout = timeout

    def get(self, path: str, **query: object) -> Any:
        """Return the document at `path`. Query values of None are omitted."""
        return self._request_document("GET", path, None, query)

    def post(self, path: str, document: object = None, **query: object) -> Any:
        """Send a document; return the one in the response, or None."""
        return self._request_document("POST", path, document, query)

    def put(self, path: str, document: object, **query: object) -> Any:
        """Replace the document at `path`; return the one in the response, or None."""
        return self._request_document("PUT", path, document, query)

    def delete(self, path: str, **query: object) -> Any:
        """Delete the document at `path`; return the one in the response, or None."""
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
        """Yield the events of a long operation as they happen; raise the error if one arrives.

        `upload`, a file or chunks of bytes, is sent as the request body at the same time. Closing
        the iterator cancels the operation.
        """
        with self._request(method, path, document, query, upload) as response:
            for line in _iter_lines(response):
                event = json.loads(line)
                if isinstance(event, dict) and event.keys() == {"error"}:
                    raise error_from_code(**event["error"])
                yield event

    def post_to_file(self, path: str, document: object, file: BinaryIO, **query: object) -> int:
        """POST a document and write the response body to `file`; return the number of bytes."""
        with self._request("POST", path, document, query) as response:
            return sum(map(file.write, _iter_body(response)))

    def is_ready(self) -> bool:
        """Tell whether the daemon is ready to serve."""
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
        """Yield a successful response with its body unread; raise any other as its error."""
        with ExitStack() as stack:
            with _map_errors():
                connection = stack.enter_context(_connect(self._store_path, self._timeout))
                connection.sendall(_encode_head(method, path, document, query, upload))
            sending = _UploadThread(connection, upload) if upload is not None else None
            try:
                with _map_errors():
                    response = http.client.HTTPResponse(connection, method=method)
                    # The response keeps the connection open until it is closed.
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
    """Sends a chunked request body in a thread, because the daemon responds before its end.

    If reading the source fails, `error` is set and the body is truncated, so that the daemon does
    not take it for complete.
    """

    def __init__(self, connection: socket.socket, upload: UploadBody) -> None:
        self.error: Exception | None = None
        self._connection = connection
        self._chunks = _iter_chunks(upload)
        threading.Thread(target=self._send, name="upload", daemon=True).start()

    def _send(self) -> None:
        # If the daemon stops reading, its response says why.
        with suppress(OSError):
            for chunk in self._read_chunks():
                self._connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if self.error:
                self._connection.shutdown(socket.SHUT_RDWR)
            else:
                self._connection.sendall(b"0\r\n\r\n")

    def _read_chunks(self) -> Iterator[bytes]:
        try:
            yield from self._chunks
        except Exception as error:  # noqa: BLE001 - the thread that reads the response raises it
            self.error = error


def _iter_chunks(upload: UploadBody) -> Iterator[bytes]:
    # Iterating over a file would yield lines, which may have any length.
    read = getattr(upload, "read", None)
    return iter(partial(read, CHUNK_SIZE), b"") if read else filter(None, upload)


def _encode_head(
    method: str,
    path: str,
    document: object,
    query: Mapping[str, object],
    upload: UploadBody | None,
) -> bytes:
    """Return request line, headers and, unless it is an upload, the body."""
    parameters = {
        name: _format_query_value(value) for name, value in query.items() if value is not None
    }
    target = f"{path}?{urlencode(parameters)}" if parameters else path
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
    """Yield the body as it arrives. Only `read1` tells a truncated body from a complete one."""
    while True:
        with _map_errors():
            chunk = response.read1(CHUNK_SIZE)
            if not chunk and response.length:
                raise http.client.IncompleteRead(b"", response.length)
        if not chunk:
            return
        yield chunk


def _iter_lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    incomplete = b""
    for chunk in _iter_body(response):
        *lines, incomplete = (incomplete + chunk).split(b"\n")
        yield from lines


def _read_error(response: http.client.HTTPResponse) -> ProxyError:
    content = b"".join(_iter_body(response))
    try:
        error = json.loads(content)["error"]
        return error_from_code(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        text = content[:100].decode(errors="replace")
        return ProxyError(f"the daemon responded with status {response.status}: {text}")


@contextmanager
def _map_errors() -> Iterator[None]:
    """Raise the errors of a daemon that stops or is silent as `DaemonUnavailableError`."""
    try:
        yield
    except TimeoutError as error:
        raise DaemonUnavailableError("the daemon did not respond in time") from error
    except (http.client.HTTPException, ConnectionError, FileNotFoundError) as error:
        raise DaemonUnavailableError(
            "the daemon stopped during the request; run the command again"
        ) from error


@contextmanager
def _connect(store_path: Path, timeout: float | None = None) -> Iterator[socket.socket]:
    """Yield a connection to the daemon's socket. Raises `OSError`."""
    # A socket address may have 107 bytes, fewer than the path of a store: use a descriptor instead.
    directory = os.open(store_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, directory)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(timeout)
        connection.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        yield connection


def has_store(path: Path) -> bool:
    """Tell whether there is a store at `path`, or the copy of one."""
    return any((path / name).exists() for name in ("lock", "blobs", "index.sqlite"))


def store_not_found_message(path: Path) -> str:
    """Return what to tell a user whose command found no store at `path`."""
    return f"there is no store at {path}; pass its directory with --store, or its file with -c"


def _is_daemon_listening(store_path: Path) -> bool:
    """Tell whether a daemon is listening; raise `DaemonUnavailableError` without permission."""
    try:
        with _connect(store_path):
            return True
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise DaemonUnavailableError(
            f"{store_path}/{SOCKET_NAME}: permission denied; "
            "run this as the daemon's user or as root"
        ) from error
