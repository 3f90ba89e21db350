"""The handler of the admin API on its real socket, with test routes and the commands' client."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest

from proxy.cli.api_client import AdminClient
from proxy.config import ServerSettings
from proxy.errors import (
    DaemonUnavailableError,
    InvalidRequestError,
    NoSpaceError,
    NotFoundError,
    ProxyError,
    UnknownManifestError,
    error_code,
    error_from_code,
)
from proxy.metrics import Metrics
from proxy.server.admin.api import (
    MAX_DOCUMENT_SIZE,
    AdminRequest,
    ByteStream,
    RequestModel,
    Route,
)
from proxy.server.admin.handler import AdminApiHandler
from proxy.server.admin.listener import AdminServices, listen
from proxy.server.health import HealthEndpoints
from proxy.server.pages.links import PageLinks
from proxy.server.pages.sessions import SessionStore


class EchoRequest(RequestModel, frozen=True):
    image: str
    count: int = 1
    is_pinned: bool = False


class ServedApi:
    """An admin API with the routes of one test: `client` is that of the commands, `send` is raw."""

    def __init__(
        self, root: Path, metrics: Metrics, handler: AdminApiHandler, session: aiohttp.ClientSession
    ):
        self.metrics = metrics
        self.handler = handler
        self.client = AdminClient(root)
        self.session = session

    async def send(self, method: str, path: str, **kwargs) -> tuple[int, dict[str, str], object]:
        url = f"http://localhost{path}"
        async with self.session.request(method, url, **kwargs) as response:
            content = await response.read()
            return response.status, dict(response.headers), json.loads(content or b"null")


ServeRoutes = Callable[..., Awaitable[ServedApi]]


@pytest.fixture
async def serve(tmp_path) -> AsyncIterator[ServeRoutes]:
    async with AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        group = await stack.enter_async_context(asyncio.TaskGroup())

        async def check_store() -> None:
            pass

        async def make(*routes: Route) -> ServedApi:
            metrics = Metrics([], "0")
            handler = AdminApiHandler(routes, metrics, None)
            health = HealthEndpoints(metrics, check_store, threads)
            links = PageLinks(SessionStore())
            services = AdminServices(ServerSettings(), handler, health, links, group)
            await listen(stack, tmp_path, services)
            connector = aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
            session = aiohttp.ClientSession(connector=connector)
            return ServedApi(tmp_path, metrics, handler, await stack.enter_async_context(session))

        yield make


async def echo_body(request: AdminRequest) -> object:
    return await request.read_json(EchoRequest)


async def echo_query(request: AdminRequest) -> object:
    return request.parse_query(EchoRequest)


async def test_bodies_queries_and_responses_are_json(serve):
    api = await serve(
        Route("POST", "/api/v1/echo", echo_body), Route("GET", "/api/v1/echo", echo_query)
    )
    document = {"image": "ghcr.io/a/b:1@sha256:0", "count": 3, "is_pinned": True}
    assert await asyncio.to_thread(api.client.post, "/api/v1/echo", document) == document
    response_document = await asyncio.to_thread(
        api.client.get, "/api/v1/echo", nothing=None, **document
    )
    assert response_document == document


async def test_a_handler_without_a_result_responds_with_204(serve):
    async def delete(request: AdminRequest) -> None:
        pass

    api = await serve(Route("DELETE", "/api/v1/things/{name}", delete))
    assert (await api.send("DELETE", "/api/v1/things/a"))[0] == 204
    assert await asyncio.to_thread(api.client.delete, "/api/v1/things/a") is None


async def test_path_parameters_are_passed_to_the_handler(serve):
    async def path_params(request: AdminRequest) -> object:
        return request.path_params

    api = await serve(Route("GET", "/api/v1/things/{first}/parts/{second}", path_params))
    _, _, document = await api.send("GET", "/api/v1/things/a.b/parts/sha256%3A1")
    assert document == {"first": "a.b", "second": "sha256:1"}
    for path in ("/api/v1/things//parts/x", "/api/v1/things/a/b/parts/x", "/api/v1/thingsX"):
        assert (await api.send("GET", path))[0] == 404


async def test_unknown_paths_and_methods_are_errors(serve):
    api = await serve(
        Route("POST", "/api/v1/echo", echo_body), Route("GET", "/api/v1/echo", echo_query)
    )
    status, _, document = await api.send("GET", "/api/v1/nothing")
    assert (status, document["error"]["code"]) == (404, "not_found")
    status, headers, document = await api.send("DELETE", "/api/v1/echo")
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert "GET, POST" in document["error"]["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "truncated"),
        (b"[]", "body: expected object, got array"),
        (b"{}", "image"),
        (b'{"image": 1}', "body: image: expected str, got int"),
        (b'{"image": "a", "colour": 1}', "colour"),
        (b" " * (MAX_DOCUMENT_SIZE + 1), f"more than {MAX_DOCUMENT_SIZE} bytes"),
    ],
    ids=["not JSON", "no object", "missing", "wrong type", "unknown", "too large"],
)
async def test_an_invalid_body_is_rejected_with_the_name_of_the_field(serve, body, reason):
    api = await serve(Route("POST", "/api/v1/echo", echo_body))
    headers = {"Content-Type": "application/json"}
    status, _, document = await api.send(
        "POST", "/api/v1/echo", data=BytesIO(body), headers=headers
    )
    assert (status, document["error"]["code"]) == (400, "invalid_request")
    assert reason in document["error"]["message"]


async def test_a_body_that_is_not_json_is_rejected(serve):
    api = await serve(Route("POST", "/api/v1/echo", echo_body))
    status, _, document = await api.send("POST", "/api/v1/echo", data=b'{"image": "a"}')
    assert (status, "Content-Type" in document["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("query", "reason"),
    [("image=a&count=x", "count"), ("image=a&colour=1", "colour"), ("image=a&image=b", "once")],
)
async def test_an_invalid_query_is_rejected_with_the_name_of_the_field(serve, query, reason):
    api = await serve(Route("GET", "/api/v1/echo", echo_query))
    status, _, document = await api.send("GET", f"/api/v1/echo?{query}")
    assert (status, reason in document["error"]["message"]) == (400, True)


async def test_events_are_sent_as_they_happen(serve):
    seen = asyncio.Event()

    async def count(request: AdminRequest):
        yield {"n": 1}
        await seen.wait()
        yield {"n": 2}

    api = await serve(Route("POST", "/api/v1/count", count))
    loop = asyncio.get_running_loop()

    def collect_events() -> list[object]:
        events = []
        for event in api.client.stream("POST", "/api/v1/count"):
            events.append(event)
            loop.call_soon_threadsafe(seen.set)
        return events

    assert await asyncio.to_thread(collect_events) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("event_count", [0, 2])
async def test_an_error_of_the_operation_is_raised_in_the_client(serve, event_count):
    async def fail(request: AdminRequest):
        for n in range(event_count):
            yield {"n": n}
        raise NoSpaceError("the disk is full")

    api = await serve(Route("POST", "/api/v1/fail", fail))
    events = []

    def collect_events() -> None:
        events.extend(api.client.stream("POST", "/api/v1/fail"))

    with pytest.raises(NoSpaceError, match="the disk is full"):
        await asyncio.to_thread(collect_events)
    # Once an event was sent, the status is 200 whatever happens later.
    async with api.session.post("http://localhost/api/v1/fail") as response:
        assert response.status == (200 if event_count else 507)


async def test_an_error_after_the_first_event_is_the_last_event(serve):
    async def fail(request: AdminRequest):
        yield {"n": 1}
        raise UnknownManifestError("no such image")

    api = await serve(Route("POST", "/api/v1/fail", fail))
    assert await asyncio.to_thread(lambda: next(api.client.stream("POST", "/api/v1/fail")))
    with pytest.raises(UnknownManifestError, match="no such image"):
        await asyncio.to_thread(lambda: [*api.client.stream("POST", "/api/v1/fail")])


@pytest.mark.parametrize("after_first_event", [False, True])
async def test_an_unexpected_error_is_counted_and_not_disclosed(serve, after_first_event):
    async def fail(request: AdminRequest):
        if after_first_event:
            yield {"n": 1}
        raise KeyError("secret")

    api = await serve(Route("POST", "/api/v1/fail", fail))
    with pytest.raises(ProxyError, match="see the daemon's log") as caught:
        await asyncio.to_thread(lambda: [*api.client.stream("POST", "/api/v1/fail")])
    assert "secret" not in str(caught.value)
    metrics = await asyncio.to_thread(api.metrics.render)
    assert b"pullcache_internal_errors_total 1.0" in metrics


async def test_a_client_that_disconnects_cancels_its_operation(serve):
    ended = asyncio.Event()

    async def wait_forever(request: AdminRequest):
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            ended.set()

    api = await serve(Route("POST", "/api/v1/wait", wait_forever))

    def disconnect() -> None:
        events = api.client.stream("POST", "/api/v1/wait")
        assert next(events) == {"n": 1}
        events.close()

    await asyncio.to_thread(disconnect)
    await asyncio.wait_for(ended.wait(), 10)


async def test_close_cancels_running_operations_and_waits_for_them(serve):
    cleaned_up = []

    async def wait_forever(request: AdminRequest):
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned_up.append(True)

    api = await serve(Route("POST", "/api/v1/wait", wait_forever))
    events = api.client.stream("POST", "/api/v1/wait")
    assert await asyncio.to_thread(next, events) == {"n": 1}
    await api.handler.close()
    assert cleaned_up == [True]
    with pytest.raises(DaemonUnavailableError, match="stopped during"):
        await asyncio.to_thread(next, events)


async def test_events_are_sent_while_the_upload_continues(serve):
    async def count_bytes(request: AdminRequest):
        total = 0
        async for chunk in request.iter_chunks():
            total += len(chunk)
            yield {"bytes": total}

    api = await serve(Route("POST", "/api/v1/count-bytes", count_bytes))
    first_seen = threading.Event()

    def chunks() -> Iterator[bytes]:
        yield b"a" * 10
        assert first_seen.wait(10)
        yield b""
        yield b"b" * 5

    def collect_events() -> list[object]:
        events = []
        for event in api.client.stream("POST", "/api/v1/count-bytes", upload=chunks()):
            events.append(event)
            first_seen.set()
        return events

    assert await asyncio.to_thread(collect_events) == [{"bytes": 10}, {"bytes": 15}]
    source = BytesIO(b"line\n" * 1_000_000)
    events = await asyncio.to_thread(
        lambda: [*api.client.stream("POST", "/api/v1/count-bytes", upload=source)]
    )
    assert events[-1] == {"bytes": 5_000_000}


async def test_an_upload_that_breaks_off_is_not_taken_for_complete(serve):
    outcomes: list[object] = []
    ended = asyncio.Event()

    async def read_all(request: AdminRequest) -> object:
        try:
            async for _ in request.iter_chunks():
                pass
            outcomes.append("whole")
        finally:
            ended.set()
        return {}

    api = await serve(Route("POST", "/api/v1/read", read_all))

    def chunks() -> Iterator[bytes]:
        yield b"a" * 10
        raise PermissionError("the file cannot be read")

    with pytest.raises(PermissionError, match="cannot be read"):
        await asyncio.to_thread(
            lambda: [*api.client.stream("POST", "/api/v1/read", upload=chunks())]
        )
    await asyncio.wait_for(ended.wait(), 10)
    assert outcomes == []


async def test_a_rejected_upload_reports_the_reason(serve):
    async def reject(request: AdminRequest) -> None:
        raise NoSpaceError("the archive is larger than the store")

    api = await serve(Route("POST", "/api/v1/reject", reject))
    upload = [bytes(1 << 20)] * 64
    with pytest.raises(NoSpaceError, match="larger than the store"):
        await asyncio.to_thread(
            lambda: [*api.client.stream("POST", "/api/v1/reject", upload=upload)]
        )


async def test_a_byte_stream_arrives_unchanged(serve):
    async def chunks() -> AsyncGenerator[bytes, None]:
        for n in range(3):
            yield bytes([n]) * 300_000

    async def export(request: AdminRequest) -> ByteStream:
        assert (await request.read_json(EchoRequest)).image == "a"
        return ByteStream(chunks(), "application/x-tar")

    api = await serve(Route("POST", "/api/v1/export", export))
    target = BytesIO()
    written = await asyncio.to_thread(
        api.client.post_to_file, "/api/v1/export", {"image": "a"}, target
    )
    assert written == 900_000
    assert target.getvalue() == b"".join(bytes([n]) * 300_000 for n in range(3))
    with pytest.raises(InvalidRequestError, match="image"):
        await asyncio.to_thread(api.client.post_to_file, "/api/v1/export", {}, target)


async def test_a_byte_stream_that_ends_early_is_an_error(serve):
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a" * 1000
        raise NoSpaceError("the disk is gone")

    async def export(request: AdminRequest) -> ByteStream:
        return ByteStream(chunks(), "application/x-tar")

    api = await serve(Route("POST", "/api/v1/export", export))
    with pytest.raises(DaemonUnavailableError, match="stopped during"):
        await asyncio.to_thread(api.client.post_to_file, "/api/v1/export", {}, BytesIO())


def iter_error_types(error_type: type[ProxyError]):
    yield error_type
    for inner in error_type.__subclasses__():
        yield from iter_error_types(inner)


@pytest.mark.parametrize(
    "error_type", [*iter_error_types(ProxyError)], ids=lambda error_type: error_type.__name__
)
async def test_every_error_has_the_same_class_in_the_client(serve, error_type):
    async def fail(request: AdminRequest) -> None:
        raise error_type("what happened")

    api = await serve(Route("GET", "/api/v1/fail", fail))
    with pytest.raises(ProxyError, match="what happened") as caught:
        await asyncio.to_thread(api.client.get, "/api/v1/fail")
    assert type(caught.value) is error_type


def test_an_unknown_code_becomes_a_plain_error():
    assert type(error_from_code("from_the_future", "x")) is ProxyError
    assert error_code(NotFoundError("x")) == "not_found"
