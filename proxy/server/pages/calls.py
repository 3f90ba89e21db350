"""Calls of the admin API from within the process: pages show what the API answers, by the same code."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, TypeVar, cast

import msgspec

from proxy.errors import InvalidRequestError
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import AdminRequest
from proxy.server.admin.handler import AdminApiHandler

T = TypeVar("T")


class DirectRequest(AdminRequest):
    """A request to the admin API whose query and body are values already."""

    def __init__(
        self,
        path_params: Mapping[str, str],
        actor: Actor,
        query: Mapping[str, object],
        body: object,
        chunks: AsyncIterator[bytes] | None,
    ) -> None:
        self.path_params = path_params
        self.actor = actor
        self._query = query
        self._body = body
        self._chunks = chunks

    def parse_query(self, model: type[T]) -> T:
        """Return the query as a `model`. Raises `InvalidRequestError`."""
        return _convert(self._query, model)

    async def read_json(self, model: type[T]) -> T:
        """Return the body as a `model`. Raises `InvalidRequestError`."""
        return _convert(self._body, model)

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """Yield the uploaded bytes."""
        if self._chunks:
            async for chunk in self._chunks:
                yield chunk


class ApiCaller:
    """Calls operations of the admin API as one actor, whose role decides what is permitted.

    The methods raise what the operations raise, `DeniedError` if the role does not permit one.
    """

    def __init__(self, api: AdminApiHandler, actor: Actor) -> None:
        self._api = api
        self._actor = actor

    async def get(self, path: str, result: type[T], /, **query: object) -> T:
        """Return the document at `path`, which is a `result`; leave out parameters that are None."""
        del result  # tells mypy
        return cast("T", await self._call("GET", path, query))

    async def post(self, path: str, result: type[T], body: object, /, **query: object) -> T:
        """Send a document; return the answer, which is a `result`."""
        del result
        return cast("T", await self._call("POST", path, query, body))

    async def put(self, path: str, result: type[T], body: object) -> T:
        """Replace the document at `path`; return the answer, which is a `result`."""
        del result
        return cast("T", await self._call("PUT", path, {}, body))

    async def delete(self, path: str, /, **query: object) -> None:
        """Delete the document at `path`."""
        await self._call("DELETE", path, query)

    def stream(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        upload: AsyncIterator[bytes] | None = None,
        **query: object,
    ) -> AsyncGenerator[Any, None]:
        """Return the events of a long operation; close it to cancel the operation."""
        return self._stream(method, path, query, body, upload)

    async def list(self, path: str, result: type[T], limit: int, /, **query: object) -> list[T]:
        """Return at most `limit` of the events at `path`, which are `result`s."""
        del result
        events = self._stream("GET", path, query)
        found: list[T] = []
        try:
            async for event in events:
                found.append(event)
                if len(found) >= limit:
                    break
        finally:
            await events.aclose()
        return found

    def _stream(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: object = None,
        upload: AsyncIterator[bytes] | None = None,
    ) -> AsyncGenerator[Any, None]:
        result = self._start(method, path, query, body, upload)
        assert isinstance(result, AsyncGenerator), path
        return result

    async def _call(
        self, method: str, path: str, query: Mapping[str, object], body: object = None
    ) -> object:
        result = self._start(method, path, query, body, None)
        assert not isinstance(result, AsyncGenerator), path
        return await result

    def _start(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: object,
        upload: AsyncIterator[bytes] | None,
    ) -> Any:
        route, path_params = self._api.find_route(method, path)
        route.check_role(self._actor)
        given = {name: value for name, value in query.items() if value is not None}
        return route.handler(DirectRequest(path_params, self._actor, given, body, upload))


def _convert(value: object, model: type[T]) -> T:
    try:
        return msgspec.convert(value, model, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error).replace("`", "")) from error
