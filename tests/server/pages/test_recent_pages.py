"""Pages that are asked for many times in a second are rendered twice, and still each visitor's own."""

import pytest

from proxy.server.pages import recent_pages
from proxy.server.pages.recent_pages import MAX_RECENT_PAGES, RecentPages
from proxy.server.pages.templating import PageRenderer
from tests.fakes.clock import Clock
from tests.server.pages.conftest import READ_SECRET, SECRET

PATH = "/images"


@pytest.fixture
def rendered(monkeypatch) -> list[str]:
    """The templates that are rendered; pages are reused for as long as the test takes."""
    monkeypatch.setattr(recent_pages, "REUSE_TIME", 1000.0)
    templates: list[str] = []
    render = PageRenderer.render

    async def record(self, template, context):
        templates.append(template)
        return await render(self, template, context)

    monkeypatch.setattr(PageRenderer, "render", record)
    return templates


async def test_the_third_request_of_a_page_within_a_second_costs_no_rendering(client, rendered):
    texts = [(await client.get(PATH)).text for _ in range(5)]
    assert rendered == ["images.html"] * 2
    assert texts == [texts[1]] * 5


async def test_each_visitor_gets_the_token_of_his_own_forms(
    open_program, make_client, registry, rendered
):
    await open_program.pull(registry.add_image())
    clients = [await make_client(open_program) for _ in range(4)]
    tokens = [(await client.get(PATH)).token for client in clients]
    assert len(set(tokens)) == 4
    assert rendered == ["images.html"] * 2
    assert [(await client.get(PATH)).token for client in clients] == tokens


async def test_a_reader_is_never_shown_the_page_of_an_operator(
    closed_program, make_client, registry, rendered
):
    await closed_program.pull(registry.add_image())
    operator, reader = await make_client(closed_program), await make_client(closed_program)
    await operator.log_in(SECRET)
    await reader.log_in(READ_SECRET)
    for _ in range(3):
        assert 'action="/images/pin"' in (await operator.get(PATH)).text
    for _ in range(3):
        assert 'action="/images/pin"' not in (await reader.get(PATH)).text


async def test_queries_and_hosts_have_pages_of_their_own(client, open_program, rendered):
    (_, own_port), (_, port) = (
        address.rsplit(":", 1) for address in (client.url, open_program.addresses[0])
    )
    for _ in range(3):
        assert 'value="one"' in (await client.get(f"{PATH}?q=one")).text
        assert 'value="two"' in (await client.get(f"{PATH}?q=two")).text
        for host in ("localhost", "127.0.0.1"):
            shown = await client.get("/connect", Host=f"{host}:{own_port}")
            assert f"http://{host}:{port}" in shown.text
    assert sorted(rendered) == ["connect.html"] * 4 + ["images.html"] * 4


async def test_what_a_page_has_changed_is_shown_at_once(client, open_program, registry, rendered):
    image = registry.add_image()
    await open_program.pull(image)
    for _ in range(3):
        assert "Unpin" not in (await client.get(PATH)).text
    name = f"{image.repository}:{image.tag}"
    await client.submit(PATH, "/images/pin", image=name)
    assert "Unpin" in (await client.get(PATH)).text


def test_a_page_is_reused_for_a_second_after_the_first_of_two_renderings(monkeypatch):
    monkeypatch.setattr(recent_pages, "REUSE_TIME", 1.0)
    clock = Clock()
    pages = RecentPages(clock)
    pages.add("page", "first", pages.now())
    assert pages.find("page") is None
    clock.advance(0.5)
    pages.add("page", "second", pages.now())
    assert pages.find("page") == "second"
    assert pages.find("other") is None
    clock.advance(0.6)
    assert pages.find("page") is None


def test_a_page_that_was_read_before_a_change_is_not_kept(monkeypatch):
    monkeypatch.setattr(recent_pages, "REUSE_TIME", 1.0)
    clock = Clock()
    pages = RecentPages(clock)
    started = pages.now()
    clock.advance(0.1)
    pages.clear()
    pages.add("page", "old", started)
    clock.advance(0.1)
    pages.add("page", "new", pages.now())
    pages.add("page", "older", started)
    assert pages.find("page") is None


def test_the_pages_that_are_kept_are_few(monkeypatch):
    monkeypatch.setattr(recent_pages, "REUSE_TIME", 1.0)
    pages = RecentPages(Clock())
    for _ in range(2):
        for number in range(MAX_RECENT_PAGES + 1):
            pages.add(number, "text", pages.now())
    assert [pages.find(number) for number in range(MAX_RECENT_PAGES + 1)].count("text") == 0
