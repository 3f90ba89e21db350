"""What differs in narrow windows: the menu."""

import pytest
from playwright.async_api import expect

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

# CSS pixels that the head of a page may take in a narrow window.
MAX_HEAD = 64


@pytest.mark.parametrize("script", [True, False], ids=["script", "no script"])
async def test_the_menu_of_a_narrow_window_is_one_row_and_opened_by_keys(site, open_page, script):
    page = await open_page(site, "/images", width=360, java_script_enabled=script)
    head = page.locator("header")
    box = await head.bounding_box()
    assert box
    assert box["height"] <= MAX_HEAD
    await expect(head.get_by_role("link", name="Storage")).to_have_count(0)
    await head.get_by_text("Menu").focus()
    await page.keyboard.press("Enter")
    await expect(head.get_by_role("link", name="Images")).to_have_attribute("aria-current", "page")
    await head.get_by_role("link", name="Storage").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Storage")


async def test_a_wide_window_has_all_pages_in_its_head_and_no_menu(site, open_page):
    page = await open_page(site, "/")
    head = page.locator("header")
    await expect(head.get_by_text("Menu")).not_to_be_visible()
    await expect(head.get_by_role("link", name="Storage")).to_be_visible()
