"""What people do at the pages: with the mouse, with keys only, without a script, and two at a time."""

import re
from urllib.parse import urlsplit

import pytest
from playwright.async_api import expect

from tests.support.page_client import make_link

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

SECRET = "s3cret"


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
async def test_an_image_is_pinned_refreshed_and_removed(site, open_page, script):
    page = await open_page(site, "/images", java_script_enabled=script)
    row = page.locator("tr", has_text="redis:7")
    await row.get_by_role("button", name="Pin", exact=True).click()
    await expect(page.get_by_role("status")).to_contain_text("redis:7 is pinned")
    row = page.locator("tr", has_text="redis:7")
    await row.get_by_role("button", name="Unpin").click()
    await expect(page.get_by_role("status")).to_contain_text("not pinned any more")
    await page.locator("tr", has_text="redis:7").get_by_role("button", name="Refresh").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Refresh redis:7")
    await expect(page.locator("#live")).to_contain_text("redis:7: ", timeout=15_000)
    await page.get_by_role("link", name="Back").click()
    await page.get_by_role("link", name="Remove redis:7").click()
    await expect(page.locator("main")).to_contain_text("This frees")
    await page.get_by_role("button", name="Remove").click()
    await expect(page.get_by_role("status")).to_contain_text("redis:7 was removed")
    await expect(page.locator("tr", has_text="redis:7")).to_have_count(0)


async def test_the_list_is_filtered_while_one_types(site, open_page):
    page = await open_page(site, "/images")
    await page.keyboard.press("/")
    await page.keyboard.type("graf")
    await expect(page.locator("tbody tr")).to_have_count(1)
    await expect(page.locator("tbody")).to_contain_text("grafana/grafana:11.4.0")
    assert urlsplit(page.url).query == "q=graf&order=name"
    await page.locator("#order").select_option("size")
    await expect(page).to_have_url(re.compile("order=size"))


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
async def test_packages_are_read_and_filtered(site, open_page, script):
    page = await open_page(site, "/images/redis:7", java_script_enabled=script)
    await page.get_by_role("button", name="Read the packages").click()
    await expect(page.locator("#live")).to_contain_text("0 packages", timeout=30_000)
    page = await open_page(site, "/images/debian:12", java_script_enabled=script)
    await expect(page.locator("#packages")).to_contain_text("CVE-2024-5535")
    await page.get_by_label("Filter").fill("libssl")
    if not script:
        await page.locator("form", has=page.get_by_label("Filter")).get_by_role("button").click()
    await expect(page.locator("#packages")).not_to_contain_text("libc-bin")
    await expect(page.locator("#packages")).to_contain_text("libssl3")


async def test_a_page_is_used_by_keys_only(site, open_page):
    page = await open_page(site, "/")
    await page.keyboard.press("Tab")
    await expect(page.locator(":focus")).to_have_text("Skip to the content")
    await page.keyboard.press("Enter")
    for _ in range(3):
        await page.keyboard.press("Tab")
    await page.goto(page.url.partition("#")[0])
    for _ in range(12):
        await page.keyboard.press("Tab")
        if (await page.locator(":focus").inner_text()) == "Images":
            break
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Images")
    outline = await page.evaluate("() => { document.querySelector('nav a').focus(); return true }")
    assert outline


async def test_a_text_is_copied_by_its_button(site, open_page):
    page = await open_page(
        site, "/images/nginx:1.27", permissions=["clipboard-write", "clipboard-read"]
    )
    await page.get_by_role("button", name="Copy the docker command").click()
    copied = await page.evaluate("() => navigator.clipboard.readText()")
    assert copied.endswith("/library/nginx:1.27")
    assert copied.startswith("docker pull ")


async def test_the_overview_shows_a_pull_as_it_happens(site, registry, open_page):
    page = await open_page(site, "/")
    before = await page.locator("#live").inner_text()
    await site.pull(registry.add_image("library/fresh", layers=[b"fresh" * 100_000]))
    await expect(page.locator("#live")).not_to_have_text(before, timeout=15_000)


async def test_the_operator_sees_why_pulls_fail(site, registry, open_page):
    await registry.stop()
    for number in range(5):
        await site.manifest(f"me/other{number}")
    page = await open_page(site, "/")
    await expect(page.locator(".problems")).to_contain_text("docker.io is down")
    await expect(page.locator(".state")).to_contain_text("docker.io cannot be reached")


async def test_two_people_have_sessions_of_their_own(make_program, tmp_path, open_page):
    for name in ("token", "reader"):
        (tmp_path / name).write_text(f"{SECRET}-{name}")
    program = await make_program(
        server={
            "admin_listen": ["127.0.0.1:0"],
            "admin_token_file": str(tmp_path / "token"),
            "admin_tokens": [{"name": "reader", "file": str(tmp_path / "reader")}],
        }
    )
    operator = await open_page(program, "/")
    await operator.get_by_label("Admin token").fill("wrong")
    await operator.get_by_role("button", name="Log in").click()
    await expect(operator.get_by_role("alert")).to_contain_text("no admin token")
    reader = await open_page(program, "/images")
    for page, name in ((operator, "token"), (reader, "reader")):
        await page.get_by_label("Admin token").fill(f"{SECRET}-{name}")
        await page.get_by_role("button", name="Log in").click()
    await expect(operator.get_by_role("button", name="Go offline")).to_be_visible()
    await expect(reader.get_by_role("heading", level=1)).to_have_text("Images")
    await reader.goto(f"http://{program.admin_addresses[0]}/")
    await expect(reader.get_by_role("button", name="Go offline")).to_have_count(0)
    await operator.get_by_role("button", name="Go offline").click()
    await expect(operator.locator(".state")).to_contain_text("Offline")
    await operator.get_by_role("button", name="Log out").click()
    await expect(operator.get_by_label("Admin token")).to_be_visible()
    await reader.reload()
    await expect(reader.locator(".state")).to_contain_text("Offline")


async def test_without_tls_and_off_loopback_forms_work_too(make_program, tmp_path, open_page):
    """Such addresses are no secure context: browsers send Origin, and no Sec-Fetch-Site."""
    (tmp_path / "token").write_text(SECRET)
    program = await make_program(
        server={
            "admin_listen": ["127.0.0.1:0"],
            "admin_token_file": str(tmp_path / "token"),
            "admin_hosts": ["cache.example"],
        }
    )
    port = program.admin_addresses[0].rpartition(":")[2]
    page = await open_page(f"cache.example:{port}", "/")
    await page.get_by_label("Admin token").fill(SECRET)
    await page.get_by_role("button", name="Log in").click()
    await page.get_by_role("button", name="Go offline").click()
    await expect(page.get_by_role("status")).to_contain_text("Offline")


async def test_the_link_of_ui_opens_the_pages(program, open_page):
    link = urlsplit(await make_link(program))
    page = await open_page(link.netloc, f"{link.path}?{link.query}")
    await expect(page.locator(".state")).to_be_visible()
    assert urlsplit(page.url).path == "/"
    # A newcomer finds the first pull there.
    await expect(page.locator(".empty")).to_contain_text("docker pull")
