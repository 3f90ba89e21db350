"""The parts of an operation of the admin API: its route, its request, its response.

To add an operation:

1. Write its handler in a module of this package, and list its `Route` in the `routes()` of that
   module; a POST that changes nothing `is_read`. A path is `/api/v1/<noun>` with parameters in braces. Image references contain slashes
   and colons, so they belong in the query or the body.
2. The handler takes an `AdminRequest`. It reads the query, the JSON body (both into a
   `RequestModel`), a path parameter, or the body as a stream. A request that does not fit becomes a
   400 that names the field.
3. The handler is an `async def` that returns a document (whatever msgspec encodes; None becomes a
   204) or a `ByteStream`; or an async generator that yields the events of a long operation, each
   sent at once as a line of JSON. It raises errors of `proxy.errors`: before the first event they
   become a status, after it the last line, `{"error": {"code", "message"}}`. If the client
   disconnects, the handler is cancelled.
   A handler that changes what is served or kept does so within `ActRecorder.recording`.
4. Add the routes to the list in `configure_app` (`proxy/service.py`), and paths and schemas to
   `openapi.json`. A test compares both.
5. Write the command in `proxy/cli/commands/`, and its section in `docs/commands.md`. It uses
   `open_admin_client` (`proxy/cli/api_client.py`), which raises the errors that the handler raised.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from aiohttp.web import BaseRequest

from proxy.errors import DeniedError, InvalidRequestError
from proxy.server.admin.actor import Actor

# Bytes of a JSON body. Larger bodies are uploads, which are streamed.
MAX_DOCUMENT_SIZE = 4 << 20

T = TypeVar("T")


class RequestModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of JSON bodies and queries; an unknown field is an error."""


@dataclass(frozen=True, slots=True)
class ByteStream:
    """A response of bytes. If an error ends the chunks, the connection is closed early.

    Browsers save it as `filename`, if that is not empty.
    """

    chunks: AsyncGenerator[bytes, None]
    content_type: str
    filename: str = ""


class AdminRequest:
    """A request to the admin API by `actor`, with the parameters of its path."""

    def __init__(self, request: BaseRequest, path_params: Mapping[str, str], actor: Actor) -> None:
        self.path_params = path_params
        self.actor = actor
        self._request = request

    def parse_query(self, model: type[T]) -> T:
        """Return the query as a `model`; numbers and booleans are parsed from text.

        Raises `InvalidRequestError`.
        """
        values = self._request.query
        if repeated := [name for name in values if len(values.getall(name)) > 1]:
            raise InvalidRequestError(f"the query has {repeated[0]!r} more than once")
        with map_decode_errors("query"):
            return msgspec.convert(dict(values), model, strict=False)

    async def read_json(self, model: type[T]) -> T:
        """Return the JSON body as a `model`. Raises `InvalidRequestError`."""
        if self._request.content_type != "application/json":
            raise InvalidRequestError("Content-Type must be application/json")
        content = bytearray()
        async for chunk in self.iter_chunks():
            content += chunk
            if len(content) > MAX_DOCUMENT_SIZE:
                raise InvalidRequestError(f"the body has more than {MAX_DOCUMENT_SIZE} bytes")
        with map_decode_errors("body"):
            return msgspec.json.decode(content, type=model)

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises `ConnectionError` if the client disconnects."""
        async for chunk in self._request.content.iter_any():
            yield chunk


Handler = Callable[[AdminRequest], Awaitable[object] | AsyncGenerator[Any, None]]


@dataclass(frozen=True, slots=True)
class Route:
    """The handler of a method and path; a part of the path in braces is a parameter: `{digest}`.

    A GET changes nothing, so tokens with the role `read` permit it; of other methods, only those
    whose route `is_read`.
    """

    method: str
    path: str
    handler: Handler
    is_read: bool = False

    def check_role(self, actor: Actor) -> None:
        """Raise `DeniedError` if the role of `actor` does not permit this."""
        if actor.role != "operate" and not (self.is_read or self.method == "GET"):
            raise DeniedError(
                f"the role of the token {actor.token} is read; {self.method} {self.path} needs operate"
            )

    def match(self, path: str) -> dict[str, str] | None:
        """Return the parameters if `path`, still percent-encoded, is this route's, else None."""
        match = _compile_path(self.path).fullmatch(path)
        return {name: unquote(text) for name, text in match.groupdict().items()} if match else None


@cache
def _compile_path(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(path)))


@contextmanager
def map_decode_errors(location: str) -> Iterator[None]:
    """Turn errors of msgspec into an `InvalidRequestError` that names the field."""
    try:
        yield
    except msgspec.DecodeError as error:  # includes ValidationError
        reason, _, field = str(error).replace("`", "").partition(" - at $")
        where = f"{location}: {field.lstrip('.')}" if field else location
        raise InvalidRequestError(f"{where}: {reason[:1].lower()}{reason[1:]}") from error
