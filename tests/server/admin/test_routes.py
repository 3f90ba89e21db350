"""The admin API's machinery over its real socket, with routes of the tests' own and the commands' client."""

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
    AdminApiHandler,
    AdminRequest,
    ByteStream,
    RequestModel,
    Route,
)
from proxy.server.admin.listener import listen
from proxy.server.health import HealthEndpoints


class Wanted(RequestModel, frozen=True):
    image: str
    count: int = 1
    is_pinned: bool = False


class Served:
    """An admin API with the routes of one test. `ask` is what a program sends, `client` what commands use."""

    def __init__(
        self, root: Path, metrics: Metrics, api: AdminApiHandler, session: aiohttp.ClientSession
    ):
        self.metrics = metrics
        self.api = api
        self.client = AdminClient(root)
        self.session = session

    async def ask(self, method: str, path: str, **kwargs) -> tuple[int, dict[str, str], object]:
        url = f"http://localhost{path}"
        async with self.session.request(method, url, **kwargs) as answer:
            content = await answer.read()
            return answer.status, dict(answer.headers), json.loads(content or b"null")


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tmp_path) -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        group = await stack.enter_async_context(asyncio.TaskGroup())

        async def check_store() -> None:
            pass

        async def make(*routes: Route) -> Served:
            metrics = Metrics([], "0")
            api = AdminApiHandler(routes, metrics, None)
            admin = HealthEndpoints(metrics, check_store, threads)
            await listen(stack, group, tmp_path, ServerSettings(), api, admin)
            connector = aiohttp.UnixConnector(str(tmp_path / "admin.sock"))
            session = aiohttp.ClientSession(connector=connector)
            return Served(tmp_path, metrics, api, await stack.enter_async_context(session))

        yield make


async def echo(call: AdminRequest) -> object:
    return await call.read_json(Wanted)


async def search(call: AdminRequest) -> object:
    return call.parse_query(Wanted)


async def test_a_document_goes_in_and_comes_out(serve):
    served = await serve(Route("POST", "/api/v1/echo", echo), Route("GET", "/api/v1/echo", search))
    wanted = {"image": "ghcr.io/a/b:1@sha256:0", "count": 3, "is_pinned": True}
    assert await asyncio.to_thread(served.client.post, "/api/v1/echo", wanted) == wanted
    got = await asyncio.to_thread(served.client.get, "/api/v1/echo", nothing=None, **wanted)
    assert got == wanted


async def test_nothing_to_say_is_204(serve):
    async def forget(call: AdminRequest) -> None:
        pass

    served = await serve(Route("DELETE", "/api/v1/things/{name}", forget))
    assert (await served.ask("DELETE", "/api/v1/things/a"))[0] == 204
    assert await asyncio.to_thread(served.client.delete, "/api/v1/things/a") is None


async def test_a_part_of_a_path_has_a_name(serve):
    async def names(call: AdminRequest) -> object:
        return call.path_params

    served = await serve(Route("GET", "/api/v1/things/{one}/parts/{two}", names))
    _, _, document = await served.ask("GET", "/api/v1/things/a.b/parts/sha256%3A1")
    assert document == {"one": "a.b", "two": "sha256:1"}
    for path in ("/api/v1/things//parts/x", "/api/v1/things/a/b/parts/x", "/api/v1/thingsX"):
        assert (await served.ask("GET", path))[0] == 404


async def test_what_is_not_there_says_so(serve):
    served = await serve(Route("POST", "/api/v1/echo", echo), Route("GET", "/api/v1/echo", search))
    status, _, document = await served.ask("GET", "/api/v1/nothing")
    assert (status, document["error"]["code"]) == (404, "not_found")
    status, headers, document = await served.ask("DELETE", "/api/v1/echo")
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert "GET, POST" in document["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says"),
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
async def test_a_body_that_does_not_fit_is_refused_and_its_field_named(serve, body, says):
    served = await serve(Route("POST", "/api/v1/echo", echo))
    headers = {"Content-Type": "application/json"}
    status, _, document = await served.ask(
        "POST", "/api/v1/echo", data=BytesIO(body), headers=headers
    )
    assert (status, document["error"]["code"]) == (400, "invalid_request")
    assert says in document["error"]["message"]


async def test_a_body_of_another_type_is_refused(serve):
    served = await serve(Route("POST", "/api/v1/echo", echo))
    status, _, document = await served.ask("POST", "/api/v1/echo", data=b'{"image": "a"}')
    assert (status, "Content-Type" in document["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("query", "says"),
    [("image=a&count=x", "count"), ("image=a&colour=1", "colour"), ("image=a&image=b", "once")],
)
async def test_a_query_that_does_not_fit_is_refused_and_its_field_named(serve, query, says):
    served = await serve(Route("GET", "/api/v1/echo", search))
    status, _, document = await served.ask("GET", f"/api/v1/echo?{query}")
    assert (status, says in document["error"]["message"]) == (400, True)


async def test_an_event_is_there_when_it_happens(serve):
    seen = asyncio.Event()

    async def count(call: AdminRequest):
        yield {"n": 1}
        await seen.wait()
        yield {"n": 2}

    served = await serve(Route("POST", "/api/v1/count", count))
    loop = asyncio.get_running_loop()

    def work() -> list[object]:
        events = []
        for event in served.client.stream("POST", "/api/v1/count"):
            events.append(event)
            loop.call_soon_threadsafe(seen.set)
        return events

    assert await asyncio.to_thread(work) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("before", [0, 2])
async def test_an_operation_that_fails_raises_the_same_in_the_client(serve, before):
    async def fail(call: AdminRequest):
        for n in range(before):
            yield {"n": n}
        raise NoSpaceError("the disk is full")

    served = await serve(Route("POST", "/api/v1/fail", fail))
    events = []

    def work() -> None:
        events.extend(served.client.stream("POST", "/api/v1/fail"))

    with pytest.raises(NoSpaceError, match="the disk is full"):
        await asyncio.to_thread(work)
    # What has begun is 200, whatever comes of it.
    async with served.session.post("http://localhost/api/v1/fail") as answer:
        assert answer.status == (200 if before else 507)


async def test_the_last_event_says_how_it_failed(serve):
    async def fail(call: AdminRequest):
        yield {"n": 1}
        raise UnknownManifestError("no such image")

    served = await serve(Route("POST", "/api/v1/fail", fail))
    assert await asyncio.to_thread(lambda: next(served.client.stream("POST", "/api/v1/fail")))
    with pytest.raises(UnknownManifestError, match="no such image"):
        await asyncio.to_thread(lambda: [*served.client.stream("POST", "/api/v1/fail")])


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_bug_is_counted_and_not_told(serve, is_late):
    async def stumble(call: AdminRequest):
        if is_late:
            yield {"n": 1}
        raise KeyError("secret")

    served = await serve(Route("POST", "/api/v1/stumble", stumble))
    with pytest.raises(ProxyError, match="its log says how") as failed:
        await asyncio.to_thread(lambda: [*served.client.stream("POST", "/api/v1/stumble")])
    assert "secret" not in str(failed.value)
    metrics = await asyncio.to_thread(served.metrics.render)
    assert b"pullcache_internal_errors_total 1.0" in metrics


async def test_a_client_that_leaves_ends_its_operation(serve):
    ended = asyncio.Event()

    async def endless(call: AdminRequest):
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            ended.set()

    served = await serve(Route("POST", "/api/v1/endless", endless))

    def leave() -> None:
        events = served.client.stream("POST", "/api/v1/endless")
        assert next(events) == {"n": 1}
        events.close()

    await asyncio.to_thread(leave)
    await asyncio.wait_for(ended.wait(), 10)


async def test_the_end_of_the_daemon_ends_what_runs_and_waits_for_it(serve):
    cleaned = []

    async def endless(call: AdminRequest):
        try:
            yield {"n": 1}
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    served = await serve(Route("POST", "/api/v1/endless", endless))
    events = served.client.stream("POST", "/api/v1/endless")
    assert await asyncio.to_thread(next, events) == {"n": 1}
    await served.api.close()
    assert cleaned == [True]
    with pytest.raises(DaemonUnavailableError, match="stopped during"):
        await asyncio.to_thread(next, events)


async def test_progress_comes_while_the_upload_still_goes(serve):
    async def measure(call: AdminRequest):
        total = 0
        async for chunk in call.iter_chunks():
            total += len(chunk)
            yield {"bytes": total}

    served = await serve(Route("POST", "/api/v1/measure", measure))
    first_seen = threading.Event()

    def pieces() -> Iterator[bytes]:
        yield b"a" * 10
        assert first_seen.wait(10)
        yield b""
        yield b"b" * 5

    def work() -> list[object]:
        events = []
        for event in served.client.stream("POST", "/api/v1/measure", upload=pieces()):
            events.append(event)
            first_seen.set()
        return events

    assert await asyncio.to_thread(work) == [{"bytes": 10}, {"bytes": 15}]
    source = BytesIO(b"line\n" * 1_000_000)
    events = await asyncio.to_thread(
        lambda: [*served.client.stream("POST", "/api/v1/measure", upload=source)]
    )
    assert events[-1] == {"bytes": 5_000_000}


async def test_an_upload_whose_source_fails_is_not_taken_for_whole(serve):
    outcomes: list[object] = []
    ended = asyncio.Event()

    async def take(call: AdminRequest) -> object:
        try:
            async for _ in call.iter_chunks():
                pass
            outcomes.append("whole")
        finally:
            ended.set()
        return {}

    served = await serve(Route("POST", "/api/v1/take", take))

    def pieces() -> Iterator[bytes]:
        yield b"a" * 10
        raise PermissionError("the file cannot be read")

    with pytest.raises(PermissionError, match="cannot be read"):
        await asyncio.to_thread(
            lambda: [*served.client.stream("POST", "/api/v1/take", upload=pieces())]
        )
    await asyncio.wait_for(ended.wait(), 10)
    assert outcomes == []


async def test_an_upload_that_is_refused_says_why(serve):
    async def refuse(call: AdminRequest) -> None:
        raise NoSpaceError("the archive is larger than the store")

    served = await serve(Route("POST", "/api/v1/refuse", refuse))
    upload = [bytes(1 << 20)] * 64
    with pytest.raises(NoSpaceError, match="larger than the store"):
        await asyncio.to_thread(
            lambda: [*served.client.stream("POST", "/api/v1/refuse", upload=upload)]
        )


async def test_bytes_come_as_they_are(serve):
    async def chunks() -> AsyncGenerator[bytes, None]:
        for n in range(3):
            yield bytes([n]) * 300_000

    async def export(call: AdminRequest) -> ByteStream:
        assert (await call.read_json(Wanted)).image == "a"
        return ByteStream(chunks(), "application/x-tar")

    served = await serve(Route("POST", "/api/v1/export", export))
    target = BytesIO()
    written = await asyncio.to_thread(
        served.client.post_to_file, "/api/v1/export", {"image": "a"}, target
    )
    assert written == 900_000
    assert target.getvalue() == b"".join(bytes([n]) * 300_000 for n in range(3))
    with pytest.raises(InvalidRequestError, match="image"):
        await asyncio.to_thread(served.client.post_to_file, "/api/v1/export", {}, target)


async def test_bytes_that_end_early_are_an_error(serve):
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"a" * 1000
        raise NoSpaceError("the disk is gone")

    async def export(call: AdminRequest) -> ByteStream:
        return ByteStream(chunks(), "application/x-tar")

    served = await serve(Route("POST", "/api/v1/export", export))
    with pytest.raises(DaemonUnavailableError, match="stopped during"):
        await asyncio.to_thread(served.client.post_to_file, "/api/v1/export", {}, BytesIO())


def iter_errors(kind: type[ProxyError]):
    yield kind
    for inner in kind.__subclasses__():
        yield from iter_errors(inner)


@pytest.mark.parametrize("kind", [*iter_errors(ProxyError)], ids=lambda kind: kind.__name__)
async def test_every_error_is_itself_again_in_the_client(serve, kind):
    async def fail(call: AdminRequest) -> None:
        raise kind("what happened")

    served = await serve(Route("GET", "/api/v1/fail", fail))
    with pytest.raises(ProxyError, match="what happened") as failed:
        await asyncio.to_thread(served.client.get, "/api/v1/fail")
    assert type(failed.value) is kind


def test_a_code_that_is_not_known_is_a_plain_error():
    assert type(error_from_code("from_the_future", "x")) is ProxyError
    assert error_code(NotFoundError("x")) == "not_found"
