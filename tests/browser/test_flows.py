"""A newcomer finds an image and prepares to unplug; an operator finds out why pulls fail."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from playwright.async_api import Page, expect

from tests.browser.content import push_images
from tests.fakes.hub import FakeHub, HubRepository
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

OpenPage = Callable[..., Awaitable[Page]]
COMPOSE = "services:\n  web:\n    image: nginx:1.27\n  db:\n    image: postgres:17\n"


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    hub = FakeHub()
    hub.repositories = [
        HubRepository("nginx", "official", description="Official build of Nginx."),
        HubRepository("bitnami/nginx", "verified_publisher", "VMware"),
    ]
    await hub.start()
    yield hub
    await hub.stop()


@pytest.fixture
async def empty_site(
    make_program: Callable[..., Awaitable[Program]], registry: FakeRegistry, hub: FakeHub
) -> Program:
    """A cache that has nothing, in front of a registry with images."""
    push_images(registry)
    return await make_program(
        server={"admin_listen": ["127.0.0.1:0"]},
        fetch={"attempts": 1},
        upstreams={"docker.io": {"url": registry.url, "facts_url": hub.url}},
    )


async def see_job_end(page: Page, text: str) -> None:
    await page.wait_for_url("**/jobs/*")
    await expect(page.locator("#live")).to_contain_text(text, timeout=20_000)
    await page.get_by_role("link", name="Back").click()


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
async def test_an_image_is_found_pulled_and_a_list_made_ready_to_unplug(
    empty_site, open_page: OpenPage, script
):
    page = await open_page(empty_site, "/search", java_script_enabled=script)
    await page.get_by_label("Words, or the name").fill("nginx")
    await page.get_by_role("button", name="Search").click()
    row = page.locator("tr", has_text="Official build")
    await expect(row).to_contain_text("official")
    await row.locator("summary").click()
    await row.get_by_label("Tag").fill("1.27")
    await row.get_by_label("Pin").check()
    await row.get_by_role("button", name="Pull into the cache").click()
    await see_job_end(page, "nginx:1.27 is here")
    await expect(page.locator("tr", has_text="Official build")).to_contain_text("1 tag")
    await page.get_by_role("link", name="Unplug").click()
    await page.get_by_label(re.compile("Images: one a line")).fill(COMPOSE)
    await page.get_by_role("button", name="Check").click()
    await expect(page.locator("#answer")).to_have_text("Not yet: 1 of 2 is missing")
    await page.get_by_role("button", name="Preload what is missing").click()
    await see_job_end(page, "1 of 1 images are here")
    await expect(page.locator("#answer")).to_have_text("Yes: all of it is here")
    async with page.expect_download() as downloading:
        await page.get_by_role("button", name="Download the bundle").click()
    bundle = await (await downloading.value).path()
    await page.locator("#bundle").set_input_files(bundle)
    await page.get_by_role("button", name="Upload").click()
    await expect(page.get_by_role("status")).to_contain_text("2 of 2 images are here now")


async def test_an_operator_sees_within_ten_seconds_why_pulls_fail(
    empty_site, registry, open_page: OpenPage
):
    page = await open_page(empty_site, "/activity")
    await expect(page.locator("#live")).to_contain_text("No client has pulled")

    async def pull_in_vain() -> None:
        while True:
            await empty_site.manifest("library/wordpress")
            await asyncio.sleep(0.2)

    async with registry.down(), asyncio.TaskGroup() as group:
        pulling = group.create_task(pull_in_vain())
        live = page.locator("#live")
        await expect(live).to_contain_text("docker.io is down", timeout=10_000)
        await expect(live).to_contain_text("wordpress:latest", timeout=10_000)
        await expect(live.locator("tr", has_text="wordpress:latest").first).to_contain_text(
            "failed"
        )
        await page.get_by_role("link", name="Upstreams", exact=True).first.click()
        await expect(page.locator("#live")).to_contain_text("Asked again")
        pulling.cancel()


async def test_the_form_of_a_search_result_is_used_with_keys_only(empty_site, open_page: OpenPage):
    page = await open_page(empty_site, "/search")
    await page.keyboard.press("/")
    await page.keyboard.type("nginx")
    await page.keyboard.press("Enter")
    await expect(page.locator("tr", has_text="Official build")).to_be_visible()
    await page.locator("tr", has_text="Official build").locator("summary").focus()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(page.locator("tr", has_text="Official build").get_by_label("Tag")).to_be_focused()
    await page.keyboard.press("Control+A")
    await page.keyboard.type("1.27")
    await page.keyboard.press("Enter")
    await see_job_end(page, "nginx:1.27 is here")
