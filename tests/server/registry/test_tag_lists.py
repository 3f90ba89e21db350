"""Lists of tags and repositories: cut into pages here, and served while upstream is down."""

import re

import pytest

from tests.fakes.registry import FakeRegistry

NAMES = sorted(["1.0", "1.10", "1.9", "A", "a", "latest", "Z", "_x"])


@pytest.fixture
def tagged(registry):
    image = registry.add_image()
    for tag in reversed(NAMES):
        registry.move_tag("library/app", tag, image.digest)
    return registry


async def test_tags_come_in_ascii_order(program, tagged):
    answer = await program.ask("/v2/library/app/tags/list")
    assert answer.json == {"name": "library/app", "tags": NAMES}
    assert answer.headers["Content-Type"].startswith("application/json")
    assert "Link" not in answer.headers


async def walk(program, target: str) -> list[str]:
    """Follow the links from `target` and return what all pages list."""
    found: list[str] = []
    for _ in range(20):
        answer = await program.ask(target)
        assert answer.status == 200
        found += answer.json.get("tags", answer.json.get("repositories"))
        link = answer.headers.get("Link")
        if link is None:
            return found
        match = re.fullmatch(r'<([^>]+)>; rel="next"', link)
        assert match
        target = match[1]
    raise AssertionError("the pages do not end")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 1000])
async def test_the_links_of_the_pages_lead_through_all_tags(program, tagged, size):
    assert await walk(program, f"/v2/library/app/tags/list?n={size}") == NAMES
    assert tagged.count("tags/list") == 2  # once without a token


@pytest.mark.parametrize("upstream_page", [1, 3])
async def test_the_pages_of_upstream_do_not_matter(program, tagged, upstream_page):
    tagged.tags_page = upstream_page
    assert (await program.ask("/v2/library/app/tags/list")).json["tags"] == NAMES


async def test_last_is_exclusive_and_may_not_exist(program, tagged):
    for last in ("1.10", "1.11"):
        answer = await program.ask(f"/v2/library/app/tags/list?last={last}")
        assert answer.json["tags"] == [tag for tag in NAMES if tag > last]


async def test_a_page_of_zero_tags_is_empty(program, tagged):
    answer = await program.ask("/v2/library/app/tags/list?n=0")
    assert answer.json["tags"] == []
    assert "Link" not in answer.headers


@pytest.mark.parametrize("number", ["1000000000", "-1", "NaN", "", "9" * 5000, "1e3", "%00"])
async def test_an_invalid_or_huge_number_is_not_an_internal_error(program, tagged, number):
    answer = await program.ask(f"/v2/library/app/tags/list?n={number}")
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert set(answer.json["tags"]) <= set(NAMES)


async def test_a_repository_without_tags_has_an_empty_list(program, registry):
    registry.repository("library/empty")
    assert (await program.ask("/v2/library/empty/tags/list")).json["tags"] == []


async def test_the_links_of_another_upstream_keep_its_name(make_program, tagged):
    other = {"upstreams": {"ghcr.io": {"url": tagged.url}}}
    program = await make_program(**other)
    assert await walk(program, "/v2/ghcr.io/library/app/tags/list?n=3") == NAMES
    assert await walk(program, "/v2/library/app/tags/list?ns=ghcr.io&n=3") == NAMES


async def test_a_list_is_requested_once_and_served_while_upstream_is_down(program, tagged):
    await program.ask("/v2/library/app/tags/list")
    before = len(tagged.requests)
    await program.ask("/v2/library/app/tags/list")
    assert len(tagged.requests) == before
    program.clock.advance(100_000)
    async with tagged.down():
        answer = await program.ask("/v2/library/app/tags/list")
        assert answer.json["tags"] == NAMES
        assert "stale" in answer.headers["Cache-Status"]


async def test_without_upstream_the_cached_tags_are_listed(program, tagged):
    await program.manifest("library/app", "a")
    async with tagged.down():
        assert (await program.ask("/v2/library/app/tags/list")).json["tags"] == ["a"]
        assert (await program.ask("/v2/library/none/tags/list")).status == 503


async def test_the_catalog_lists_cached_repositories(program, tagged):
    assert (await program.ask("/v2/_catalog")).json == {"repositories": []}
    for name in ("library/app", "me/b", "me/a"):
        tagged.add_image(name)
        await program.manifest(name)
    expected = ["library/app", "me/a", "me/b"]
    assert (await program.ask("/v2/_catalog")).json == {"repositories": expected}
    assert await walk(program, "/v2/_catalog?n=1") == expected
    assert (await program.ask("/v2/_catalog?last=library/app&n=1")).json["repositories"] == ["me/a"]


async def test_the_catalog_is_read_in_pages_beside_other_upstreams(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(
            upstreams={
                "docker.io": {"url": registry.url},
                "ghcr.io": {"url": other.url},
            }
        )
        for name in ("library/app", "me/denied1", "me/denied2", "me/app", "zoo/app"):
            registry.add_image(name)
            await program.manifest(name)
        other.add_image("me/app")
        await program.manifest("ghcr.io/me/app")
        await program.reload(
            upstreams={
                "docker.io": {"url": registry.url, "deny": ["me/denied*"]},
                "ghcr.io": {"url": other.url},
            }
        )
        expected = ["ghcr.io/me/app", "library/app", "me/app", "zoo/app"]
        for size in (1, 2, 3, 4, 5):
            assert await walk(program, f"/v2/_catalog?n={size}") == expected
        for query in ("", "?n=100", "?n=x", "?n=-1"):
            answer = await program.ask(f"/v2/_catalog{query}")
            assert answer.json["repositories"] == ([] if "-1" in query else expected)
            assert "Link" not in answer.headers
