"""What is remembered in memory is bounded in bytes, and large documents are parsed off the loop."""

import asyncio
import gc
import json
import threading
from types import ModuleType
from typing import TypeVar

import pytest
from aiohttp import ClientResponse

from proxy.cache import listings
from proxy.cache.manifests import ManifestCache
from proxy.cache.search import MAX_CACHED_PAGES_SIZE, RepositorySearch
from proxy.errors import NotFoundError
from proxy.oci import manifest as oci
from proxy.oci.reference import Repository, Tag
from proxy.upstream import responses, search
from proxy.upstream.registry_client import MAX_LARGE_RESPONSES
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, descriptor, digest_of
from tests.fakes.faults import Fault
from tests.fakes.search import ListedRepository

APP = "library/app"
MIB = 1 << 20
T = TypeVar("T")
# 7 MB, in an order that has to be sorted.
TAGS = [f"v{number:06}" for number in range(640_000, 0, -1)]


def find_cache(kind: type[T]) -> T:
    """Return the object of this class that the running program uses."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is kind][-1]


@pytest.fixture
def parsed_in(monkeypatch) -> set[str]:
    """The names of the threads in which upstream's lists are parsed."""
    names: set[str] = set()

    def record(module: ModuleType, name: str) -> None:
        parse = getattr(module, name)

        def parse_and_record(*args):
            names.add(threading.current_thread().name)
            return parse(*args)

        monkeypatch.setattr(module, name, parse_and_record)

    record(responses, "parse_tags")
    record(responses, "parse_referrers")
    record(search, "parse_search_page")
    return names


async def test_m04_large_tag_lists_are_kept_up_to_a_bound_in_bytes(registry, program, parsed_in):
    body = json.dumps({"tags": TAGS}).encode()
    assert len(body) > 6 * MIB
    registry.fail("tags/list", Fault(status=200, body=body), times=None)
    for number in range(4):
        answer = await program.ask(f"/v2/library/app{number}/tags/list?n=3")
        assert answer.json["tags"] == ["v000001", "v000002", "v000003"]
    assert threading.main_thread().name not in parsed_in
    cache = find_cache(listings.ListingCache)._tag_cache
    assert 6 * MIB < cache._size <= listings.MAX_CACHED_LISTS_SIZE
    # The most recent list is still there, as a whole.
    before = registry.count("tags/list")
    whole = await program.ask("/v2/library/app3/tags/list")
    assert whole.json["tags"] == TAGS[::-1]
    assert registry.count("tags/list") == before


async def test_m04_large_referrer_lists_are_kept_up_to_a_bound_in_bytes(
    registry, program, parsed_in
):
    entry = {**descriptor(b"x", OCI_MANIFEST), "artifactType": "a/b"}
    other = {**entry, "artifactType": "a/c", "annotations": {"x": "é\n"}}
    entries = [entry] * 40_000 + [other]
    body = json.dumps({"mediaType": OCI_INDEX, "manifests": entries}).encode()
    assert 6 * MIB < len(body) < 8 * MIB
    fault = Fault(status=200, body=body, headers={"Content-Type": OCI_INDEX})
    registry.fail("referrers/", fault, times=None)
    for number in range(6):
        answer = await program.ask(
            f"/v2/{APP}/referrers/{digest_of(b'%d' % number)}?artifactType=a/c"
        )
        assert answer.json["manifests"] == [other]
        assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    assert threading.main_thread().name not in parsed_in
    cache = find_cache(listings.ListingCache)._referrer_cache
    assert 6 * MIB < cache._size <= listings.MAX_CACHED_LISTS_SIZE
    whole = await program.ask(f"/v2/{APP}/referrers/{digest_of(b'5')}")
    assert whole.json["manifests"] == entries


async def test_m04_search_results_are_kept_up_to_a_bound_in_bytes(
    registry, make_program, parsed_in
):
    registry.catalogue = [
        ListedRepository(f"library/app{number}", "é" * 4000) for number in range(100)
    ]
    program = await make_program(upstreams={"docker.io": {"url": registry.url}})
    for number in range(30):
        await program.ask(f"/v1/search?q=app&n=100&page={number + 1}")
    pages = find_cache(RepositorySearch)._page_cache
    assert 0 < pages._size <= MAX_CACHED_PAGES_SIZE


async def test_l08_a_missing_tag_is_remembered_without_the_frames_that_found_it(registry, program):
    registry.add_image()
    assert (await program.manifest(APP, "none")).status == 404
    cache = find_cache(ManifestCache)._missing_tags
    remembered = cache.get_with_age((Repository("docker.io", APP), Tag("none")))
    assert remembered
    error = remembered[1]
    assert isinstance(error, NotFoundError)
    assert len(str(error)) <= 200
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)
    requests = len(registry.requests)
    assert (await program.manifest(APP, "none")).status == 404
    assert len(registry.requests) == requests
    # The answer from memory did not attach its frames either.
    assert error.__traceback__ is None


async def test_m04_few_large_responses_of_a_registry_are_read_at_a_time(
    registry, program, monkeypatch
):
    registry.auth = False
    reading: list[int] = []
    all_read, only_large_read = asyncio.Event(), asyncio.Event()
    most = 0
    read = responses.read_bounded

    async def read_and_count(response: ClientResponse, limit: int) -> bytes:
        nonlocal most
        reading.append(1)
        most = max(most, len(reading))
        if len(reading) == 12 + MAX_LARGE_RESPONSES:
            all_read.set()
        try:
            return await read(response, limit)
        finally:
            reading.pop()
            if len(reading) == MAX_LARGE_RESPONSES:
                only_large_read.set()

    monkeypatch.setattr(responses, "read_bounded", read_and_count)
    large, small = asyncio.Event(), asyncio.Event()
    body = json.dumps({"tags": [f"v{number:05}" for number in range(12_000)]}).encode()
    registry.fail(
        "/large.*/tags", Fault(status=200, body=body, stall_at=9, until=large), times=None
    )
    registry.fail(
        "/small.*/tags", Fault(status=200, body=b"{}", stall_at=1, until=small), times=None
    )
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(program.ask(f"/v2/library/{kind}{number}/tags/list?n=1"))
            for kind in ("large", "small")
            for number in range(12)
        ]
        await registry.until(lambda: registry.count("/tags/list") == 24)
        await all_read.wait()
        small.set()
        await only_large_read.wait()
        large.set()
    assert most == 12 + MAX_LARGE_RESPONSES
    assert {(await one).status for one in asked} == {200}


async def test_m05_a_large_index_is_parsed_once_for_clients_that_take_none(
    registry, program, monkeypatch
):
    image = registry.add_image(index=True)
    index = json.loads(registry.repository(APP).manifests[image.digest].content)
    index["annotations"] = {"padding": "x" * 100_000}
    registry.add_manifest(APP, "large", json.dumps(index).encode(), OCI_INDEX)
    await program.manifest(APP, "large")
    parsed: list[int] = []
    parse = oci.parse_manifest

    def parse_and_record(content: bytes, content_type: str) -> oci.Manifest:
        parsed.append(len(content))
        return parse(content, content_type)

    monkeypatch.setattr(oci, "parse_manifest", parse_and_record)
    for _ in range(5):
        answer = await program.manifest(APP, "large", Accept=OCI_MANIFEST)
        assert (answer.status, answer.digest) == (200, image.manifest)
    assert len([size for size in parsed if size > 100_000]) == 1
