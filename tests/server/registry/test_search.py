"""Search through the cache: results of upstream, older results, cached images."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from proxy.cache.search import MAX_CACHED_PAGES, SEARCH_TTL
from tests.fakes.faults import HTML, Fault
from tests.fakes.raw_client import exchange
from tests.fakes.registry import FakeRegistry
from tests.fakes.search import ListedRepository
from tests.support.program import Answer, Program

NGINX = ListedRepository("nginx", "Official build of Nginx.", 21000, official=True)
BITNAMI = ListedRepository("bitnami/nginx", "Bitnami's nginx", 200)
FIELDS = {"num_pages", "num_results", "page", "page_size", "query", "results"}


@pytest.fixture
def hub(registry: FakeRegistry) -> FakeRegistry:
    """A registry that answers searches itself, like a Docker Hub at another address."""
    registry.catalogue = [BITNAMI, NGINX]
    return registry


@pytest.fixture
async def index_host() -> AsyncIterator[FakeRegistry]:
    """A host that only answers searches."""
    async with FakeRegistry() as other:
        other.catalogue = [NGINX]
        yield other


async def search(program: Program, query: str = "q=nginx", **headers: str) -> Answer:
    return await program.ask(f"/v1/search?{query}", **headers)


def names(answer: Answer) -> list[str]:
    assert answer.status == 200
    assert set(answer.json) == FIELDS
    return [one["name"] for one in answer.json["results"]]


async def cache(program: Program, registry: FakeRegistry, *repositories: str) -> None:
    for name in repositories:
        registry.add_image(name)
        await program.manifest(name)


# Requests of docker.


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_ping_tells_docker_not_to_send_a_password(program, registry, method):
    answer = await program.ask("/v1/_ping", method)
    assert answer.status == 200
    assert answer.headers["X-Docker-Registry-Standalone"] == "false"
    assert "WWW-Authenticate" not in answer.headers
    assert answer.body == (b'{"standalone":false}' if method == "GET" else b"")
    assert registry.requests == []


async def test_upstreams_results_arrive_with_stars_and_the_official_mark(program, hub):
    answer = await search(program, "q=nginx&n=25")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Status"] == "pullcache; fwd=miss; stored"
    assert names(answer) == ["nginx", "bitnami/nginx"]
    assert answer.json == {
        "num_pages": 1,
        "num_results": 2,
        "page": 1,
        "page_size": 25,
        "query": "nginx",
        "results": [
            {
                "name": one.name,
                "description": one.description,
                "star_count": one.stars,
                "is_official": one.official,
                "is_automated": False,
            }
            for one in (NGINX, BITNAMI)
        ],
    }
    assert (
        await program.metric("pullcache_requests_total", kind="search", upstream="docker.io") == 1
    )
    assert await program.metric("pullcache_upstream_requests_total", kind="search") == 1


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("q=x", "n=25&page=1"),
        ("q=x&n=0", "n=1&page=1"),
        ("q=x&n=-7&page=-7", "n=1&page=1"),
        ("q=x&n=1000000000&page=1000000000", "n=100&page=100"),
        ("q=x&n=NaN&page=", "n=25&page=1"),
        ("q=x&n=" + "9" * 5000, "n=25&page=1"),
        ("q=x&n=7&page=3", "n=7&page=3"),
    ],
)
async def test_limit_and_page_are_clamped(program, hub, asked, sent):
    answer = await search(program, asked)
    assert answer.status == 200
    assert [one.target for one in hub.seen("search")] == [f"/v1/search?q=x&{sent}"]


async def test_pages_are_cached_separately(program, hub):
    pages = [names(await search(program, f"q=nginx&n=1&page={page}")) for page in (1, 2, 3, 1)]
    assert pages == [["nginx"], ["bitnami/nginx"], [], ["nginx"]]
    assert hub.count("search") == 3


@pytest.mark.parametrize("words", ["a" * 256, "a%00b", "%1B[31m", "%E2%80%AEx", "%ED%A0%80%07"])
async def test_invalid_search_terms_are_rejected_and_not_sent_upstream(program, hub, words):
    with capture_logs() as logs:
        answer = await search(program, f"q={words}")
    assert (answer.status, answer.code) == (400, "NAME_INVALID")
    assert hub.requests == []
    assert not [one for one in logs if "\x1b" in repr(one) or "\x00" in repr(one)]


async def test_raw_bytes_in_a_query_are_not_an_internal_error(program, hub):
    request = b"GET /v1/search?q=\xff\xfe&n=%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert (await exchange(program.url, request)).status in (200, 400)


@pytest.mark.parametrize("target", ["/v1/", "/v1/images/x/json", "/v1/search/", "/v1/../v2/"])
async def test_version_1_of_the_api_has_no_other_paths(program, hub, target):
    answer = await program.ask(target)
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


async def test_pushes_to_version_1_are_rejected(program, hub):
    assert (await program.ask("/v1/search?q=x", "POST")).status == 405


# Cached results.


async def test_results_are_cached_for_minutes(program, hub):
    await search(program)
    program.clock.advance(SEARCH_TTL - 1)
    again = await search(program)
    assert names(again) == ["nginx", "bitnami/nginx"]
    assert again.headers["Cache-Status"] == "pullcache; hit"
    assert names(await search(program, "q=+nginx++")) == ["nginx", "bitnami/nginx"]
    assert hub.count("search") == 1
    program.clock.advance(2)
    await search(program)
    assert hub.count("search") == 2


async def test_concurrent_searches_cost_one_request(program, hub):
    gate = asyncio.Event()
    hub.fail("/v1/search", Fault(until_headers=gate), times=None)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(search(program)) for _ in range(20)]
        await hub.until(lambda: hub.count("search") > 0)
        gate.set()
    assert hub.count("search") == 1
    assert {tuple(names(one.result())) for one in asking} == {("nginx", "bitnami/nginx")}
    states = [one.result().headers["Cache-Status"] for one in asking]
    assert states.count("pullcache; fwd=miss; stored") == 1


async def test_the_number_of_cached_results_is_limited(program, hub):
    await search(program)
    for number in range(MAX_CACHED_PAGES):
        await search(program, f"q=other{number}")
    await search(program)
    assert hub.count("q=nginx") == 2


@pytest.mark.parametrize(
    "fault",
    [
        HTML,
        Fault(status=500),
        Fault(status=429),
        Fault(status=401),
        Fault(status=404),
        Fault(hang_up=True),
        Fault(cut_at=9),
        Fault(body=b"{}"),
    ],
    ids=["html", "500", "429", "401", "404", "hang up", "cut", "nonsense"],
)
async def test_older_results_are_served_while_upstream_fails(program, hub, fault):
    await search(program)
    program.clock.advance(100_000)
    hub.fail("/v1/search", fault, times=None)
    answer = await search(program)
    assert names(answer) == ["nginx", "bitnami/nginx"]
    assert "fwd=stale" in answer.headers["Cache-Status"]


# Cached images.


@pytest.mark.parametrize("fault", [HTML, Fault(status=503), Fault(status=404)], ids=str)
async def test_while_upstream_fails_cached_images_are_found_by_name(program, hub, fault):
    await cache(program, hub, "library/nginx", "me/my-nginx", "library/me/nginx", "me/app")
    hub.fail("/v1/search", fault, times=None)
    answer = await search(program, "q=NGINX")
    assert names(answer) == ["nginx", "library/me/nginx", "me/my-nginx"]
    assert [one["is_official"] for one in answer.json["results"]] == [True, False, False]
    assert "fwd=stale" in answer.headers["Cache-Status"]
    assert names(await search(program, "q=me+app")) == ["me/app"]
    found = names(await search(program, "q=library/nginx"))
    assert found == ["nginx", "library/me/nginx", "me/my-nginx"]
    assert names(await search(program, "q=nginx&n=1&page=3")) == ["me/my-nginx"]
    for name in names(answer):
        assert (await program.manifest(name)).status == 200


async def test_a_failed_search_is_not_an_empty_result(program, hub):
    async with hub.down():
        answer = await search(program)
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    await program.wait_for_upstream()
    assert names(await search(program)) == ["nginx", "bitnami/nginx"]


async def test_a_registry_without_search_has_an_empty_result_if_nothing_is_cached(
    program, registry
):
    assert names(await search(program)) == []


async def test_offline_cached_images_are_found_without_a_request(program, hub):
    await cache(program, hub, "library/nginx")
    await program.restart(offline=True)
    hub.requests.clear()
    assert names(await search(program)) == ["nginx"]
    assert names(await search(program, "q=httpd")) == []
    assert hub.requests == []


@pytest.mark.parametrize("query", ["q=", "q=+", "n=25", "q=docker.io/"])
async def test_without_terms_all_cached_images_are_listed(program, hub, query):
    await cache(program, hub, "library/nginx", "me/app")
    assert names(await search(program, query)) == ["nginx", "me/app"]
    assert hub.count("search") == 0


# Other upstreams, other hosts.


async def test_a_registry_before_the_terms_selects_that_upstream(make_program, hub):
    async with FakeRegistry() as github:
        ghcr = {"url": github.url, "hosts": ["ghcr.local"]}
        program = await make_program(upstreams={"ghcr.io": ghcr})
        await cache(program, hub, "me/app")
        github.add_image("owner/app")
        await program.manifest("ghcr.io/owner/app")
        for answer in (
            await search(program, "q=ghcr.io/app"),
            await search(program, "q=app", Host="ghcr.local"),
        ):
            # It has no search_url, so no registry is asked.
            assert names(answer) == ["ghcr.io/owner/app"]
            assert answer.headers["Cache-Status"] == "pullcache; hit"
        assert github.count("search") == hub.count("search") == 0
        async with hub.down():
            # Terms without a registry find cached images of all upstreams.
            assert names(await search(program, "q=app")) == ["ghcr.io/owner/app", "me/app"]


async def test_another_upstream_is_searched_at_its_search_url(make_program, index_host):
    index_host.catalogue = [ListedRepository("owner/nginx", stars=3)]
    async with FakeRegistry() as github:
        ghcr = {"url": github.url, "search_url": index_host.url}
        program = await make_program(upstreams={"ghcr.io": ghcr})
        assert names(await search(program, "q=ghcr.io/nginx")) == ["ghcr.io/owner/nginx"]
        assert github.requests == []


async def test_denied_repositories_are_not_found(make_program, hub):
    docker = {"url": hub.url, "deny": ["bitnami/*"]}
    program = await make_program(upstreams={"docker.io": docker})
    assert names(await search(program)) == ["nginx"]
    await program.restart(upstreams={"docker.io": {**docker, "allow": ["library/*"]}})
    assert names(await search(program)) == ["nginx"]


async def test_cached_images_of_a_removed_upstream_are_not_found(make_program, hub):
    program = await make_program(upstreams={"ghcr.io": {"url": hub.url}})
    await cache(program, hub, "me/app")
    await program.manifest("ghcr.io/me/app")
    assert names(await search(program, "q=")) == ["ghcr.io/me/app", "me/app"]
    program.upstreams.pop("ghcr.io")
    await program.restart()
    assert names(await search(program, "q=")) == ["me/app"]


async def test_a_page_has_at_most_the_requested_number_of_results(program, hub):
    many = Fault(body=b'{"results":[%s]}' % b",".join(b'{"name":"a%d"}' % n for n in range(200)))
    hub.fail("/v1/search", many, times=None)
    answer = await search(program, "q=a&n=5")
    assert names(answer) == [f"a{n}" for n in range(5)]
    assert answer.json["num_results"] == 200


async def test_a_separate_search_host_gets_no_login_whatever_its_challenge(
    make_program, registry, index_host
):
    registry.tokens.users["bob"] = "pa:ss"
    docker = {
        "url": registry.url,
        "search_url": index_host.url,
        "username": "bob",
        "password": "pa:ss",
    }
    program = await make_program(upstreams={"docker.io": docker})
    await cache(program, registry, "me/app")
    assert registry.seen("/token")[0].headers["Authorization"].startswith("Basic ")
    assert names(await search(program)) == ["nginx"]
    for challenge in ('Basic realm="x"', f'Bearer realm="{index_host.url}/token",service="x"'):
        refused = Fault(status=401, body=b"", headers={"WWW-Authenticate": challenge})
        index_host.fail("/v1/search", refused, times=1)
        await search(program, f"q=other{len(challenge)}")
    sent = [one.headers.get("Authorization", "") for one in index_host.requests]
    assert [one for one in sent if one.startswith("Bearer ")]
    assert not [one for one in sent if one.startswith("Basic ")]
    assert b64encode(b"bob:pa:ss").decode() not in repr(sent)
    assert not registry.seen("search")


async def test_the_registrys_own_search_gets_its_login(make_program, hub):
    login = {"username": "bob", "password": "pa:ss"}
    program = await make_program(upstreams={"docker.io": {"url": hub.url, **login}})
    refused = Fault(status=401, body=b"", headers={"WWW-Authenticate": 'Basic realm="x"'})
    hub.fail("/v1/search", refused, times=1)
    assert names(await search(program)) == ["nginx", "bitnami/nginx"]
    basic = f"Basic {b64encode(b'bob:pa:ss').decode()}"
    assert hub.seen("/v1/search")[1].headers["Authorization"] == basic


async def test_a_failing_search_host_does_not_affect_pulls_and_vice_versa(
    make_program, registry, index_host
):
    docker = {"url": registry.url, "search_url": index_host.url}
    program = await make_program(upstreams={"docker.io": docker})
    host = index_host.url.removeprefix("http://")
    await index_host.stop()
    while await program.metric("pullcache_upstream_up", upstream=host) or not await program.metric(
        "pullcache_upstream_requests_total", upstream=host
    ):
        assert (await search(program)).status == 503
    assert await program.metric("pullcache_upstream_up", upstream="docker.io") == 1
    await cache(program, registry, "library/nginx")
    assert names(await search(program)) == ["nginx"]
    await index_host.start()
    async with registry.down():
        while (await program.manifest("library/none")).status != 503:
            pass
        async with asyncio.timeout(20):
            while "fwd=stale" in (await search(program)).headers["Cache-Status"]:
                pass


async def test_a_search_follows_no_redirect_to_a_forbidden_address(program, hub):
    metadata = {"Location": "http://169.254.169.254/v1/search"}
    hub.fail("/v1/search", Fault(status=302, body=b"", headers=metadata), times=None)
    answer = await search(program)
    assert answer.status == 502
    assert "169.254.169.254" in answer.json["errors"][0]["message"]
