"""`pullcache search`: new results, earlier ones, and cached images."""

import json
import re
from collections.abc import AsyncIterator

import pytest

from proxy.cache.search import SEARCH_TTL
from proxy.errors import InvalidRequestError
from tests.fakes.faults import HTML, Fault
from tests.fakes.hub import FakeHub, HubRepository
from tests.fakes.search import ListedRepository
from tests.support.admin_api import call
from tests.support.commands import run_on, run_on_terminal
from tests.support.openapi import validate

OFFLINE = "this cache is offline"
LONG = "A web server, a reverse proxy, \x1b[31ma mail proxy\x07\r\n and much more besides"
CLEAN = "A web server, a reverse proxy, [31ma mail proxy and much more besides"


@pytest.fixture
def hub(registry):
    """A registry with a search of its own, as a mirror of Docker Hub at another URL has."""
    registry.catalogue = [
        ListedRepository("me/nginx", LONG, 20),
        ListedRepository("nginx", "Official build of Nginx.", 21000, official=True),
    ]
    return registry


async def names(program, *arguments: str) -> list[str]:
    """Return the names in the results of a search."""
    document = json.loads((await run_on(program, "search", *arguments, "--json")).stdout)
    validate(document, "SearchResponse")
    return [one["name"] for one in document["results"]]


async def test_results_are_a_table_like_docker_s_and_not_truncated_in_a_pipe(program, hub):
    done = await run_on(program, "search", "nginx")
    assert (done.exit_code, done.stderr) == (0, "")
    header, first, second = done.stdout.splitlines()
    assert header.split() == ["NAME", "DESCRIPTION", "STARS", "TRUST"]
    assert re.fullmatch(r"nginx +Official build of Nginx\. +21000 +official *", first)
    assert second.split() == ["me/nginx", *CLEAN.split(), "20", "-"]


@pytest.mark.parametrize("option", [(), ("--no-trunc",)], ids=["truncated", "complete"])
async def test_on_a_terminal_descriptions_are_truncated_and_contain_no_control_characters(
    program, hub, option
):
    shown = await run_on_terminal(program, "search", "nginx", *option, columns=160)
    assert (CLEAN in shown) is bool(option)
    assert (f" {CLEAN[:44].rpartition(' ')[0]}… " in shown) is not bool(option)
    assert "\x1b[31m" not in shown
    assert "\x07" not in shown


async def test_the_limit_is_passed_to_upstream(program, hub):
    assert await names(program, "nginx", "--limit", "1") == ["nginx"]
    assert [one.target for one in hub.seen("search")] == ["/v1/search?q=nginx&n=1&page=1"]


@pytest.mark.parametrize("limit", ["0", "101"])
async def test_a_limit_out_of_range_is_exit_code_2(program, hub, limit):
    assert (await run_on(program, "search", "nginx", "--limit", limit)).exit_code == 2
    assert hub.count("search") == 0


async def test_offline_cached_images_are_found_and_stderr_says_so(program, hub):
    hub.add_image("library/nginx")
    await program.manifest("library/nginx")
    await program.restart(offline=True)
    done = await run_on(program, "search", "nginx")
    assert done.exit_code == 0
    assert done.stderr == f"docker.io was not searched ({OFFLINE}); showing cached images\n"
    (row,) = done.stdout.splitlines()[1:]
    assert row.split() == ["nginx", "in", "this", "cache", "0", "official"]
    assert await names(program, "httpd") == []


async def test_if_upstream_fails_earlier_results_are_shown_as_such(program, hub):
    await run_on(program, "search", "nginx")
    program.clock.advance(SEARCH_TTL)
    hub.fail("/v1/search", HTML, times=None)
    done = await run_on(program, "search", "nginx")
    assert done.exit_code == 0
    assert re.fullmatch(
        r"docker\.io was not searched \(.+\); showing earlier results\n", done.stderr
    )
    assert len(done.stdout.splitlines()) == 3


async def test_of_a_registry_without_a_search_the_cached_images_are_shown(make_program, hub):
    program = await make_program(upstreams={"ghcr.io": {"url": hub.url}})
    hub.add_image("me/app")
    await program.manifest("ghcr.io/me/app")
    done = await run_on(program, "search", "ghcr.io/app")
    assert "ghcr.io/me/app" in done.stdout
    assert done.stderr == (
        "ghcr.io was not searched (no search_url is set for it); showing cached images\n"
    )


async def test_an_empty_text_lists_the_cached_images_without_a_warning(program, hub):
    hub.add_image("me/app")
    await program.manifest("me/app")
    done = await run_on(program, "search", "")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "me/app" in done.stdout


async def test_a_failed_search_without_other_results_is_exit_code_1(program, hub):
    async with hub.down():
        done = await run_on(program, "search", "nginx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("pullcache: ")


async def test_a_text_with_control_characters_is_exit_code_2(program, hub):
    done = await run_on(program, "search", "a\x1b[31m")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "\x1b" not in done.stderr
    assert hub.requests == []


async def test_search_works_without_a_daemon(program, hub):
    await program.stop()
    config = program.root.parent / "search.toml"
    config.write_text(f'[upstreams."docker.io"]\nurl = "{hub.url}"\n')
    assert await names(program, "nginx", "-c", str(config)) == ["nginx", "me/nginx"]
    await program.start()


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 101}, {"page": 0}, {"upstream": "x"}])
async def test_the_admin_api_names_the_invalid_field(program, hub, wrong):
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        await call(program, "get", "/api/v1/search", text="nginx", **wrong)


async def test_the_admin_api_returns_results_page_by_page(program, hub):
    pages = [
        await call(program, "get", "/api/v1/search", text="nginx", limit=1, page=page)
        for page in (1, 2)
    ]
    assert [page["results"][0]["name"] for page in pages] == ["nginx", "me/nginx"]
    assert {page["total"] for page in pages} == {2}


@pytest.fixture
async def badges() -> AsyncIterator[FakeHub]:
    """Docker Hub's own search, which knows badges."""
    async with FakeHub() as badges:
        badges.repositories += [
            HubRepository("library/nginx", "official", stars=21000),
            HubRepository("nginx/unit", "verified_publisher", "NGINX Inc.", archived=True),
            HubRepository("bitnami/nginx", "open_source"),
            HubRepository("me/nginx"),
        ]
        yield badges


@pytest.fixture
async def with_badges(registry, badges, make_program):
    upstream = {"url": registry.url, "facts_url": badges.url}
    return await make_program(upstreams={"docker.io": upstream})


async def test_results_have_the_badges_of_docker_hubs_search(with_badges):
    done = await run_on(with_badges, "search", "nginx")
    assert [" ".join(line.split()) for line in done.stdout.splitlines()[1:]] == [
        "nginx 21000 official",
        "nginx/unit 0 verified (NGINX Inc.), archived",
        "bitnami/nginx 0 sponsored",
        "me/nginx 0 community",
    ]


@pytest.mark.parametrize(
    ("option", "found"), [("--official", ["nginx"]), ("--trusted", ["nginx", "nginx/unit"])]
)
async def test_results_can_be_restricted_by_badge(with_badges, option, found):
    assert await names(with_badges, "nginx", option) == found


@pytest.mark.parametrize("fault", [HTML, Fault(status=403), Fault(status=404), Fault(status=500)])
async def test_the_registrys_search_is_asked_while_docker_hubs_own_fails(
    with_badges, badges, hub, fault
):
    badges.break_with(fault)
    assert await names(with_badges, "nginx") == ["nginx", "me/nginx"]
    assert await names(with_badges, "nginx", "--official") == ["nginx"]


async def test_stored_images_are_listed_with_what_is_known_of_them(registry, with_badges):
    await with_badges.pull(registry.add_image("library/nginx"))
    await with_badges.restart(offline=True)
    assert await names(with_badges, "nginx", "--official") == ["nginx"]


async def test_docker_search_gets_the_official_mark(with_badges):
    answer = await with_badges.ask("/v1/search?q=nginx")
    marks = {one["name"]: one["is_official"] for one in answer.json["results"]}
    assert marks["nginx"] is True
    assert marks["nginx/unit"] is False
