"""Every page: in light and dark, wide and narrow, without JavaScript, and for everybody."""

import os
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import expect

from tests.browser.paths import PATHS

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

WIDTHS = (360, 1440)
SCHEMES = ("light", "dark")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
# Where to put the screenshots; they are looked at by people.
SCREENSHOTS = os.environ.get("PULLCACHE_SCREENSHOTS", "")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PATHS)
async def test_a_page_fits_its_window_and_has_no_violation_of_wcag(site, open_page, name, scheme):
    for width in WIDTHS:
        page = await open_page(site, PATHS[name], scheme=scheme, width=width, bypass_csp=True)
        await expect(page.locator("main")).to_be_visible()
        too_wide = await page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert too_wide <= 0, f"{name} at {width}: {too_wide} px too wide"
        result = await Axe().run(page, options=RULES)
        assert result.response["violations"] == [], result.generate_report()
        if SCREENSHOTS:
            path = Path(SCREENSHOTS) / f"{name}-{scheme}-{width}.png"
            await page.screenshot(path=path, full_page=True)
        await page.context.close()


@pytest.mark.parametrize("name", PATHS)
async def test_a_page_keeps_its_policy_and_works_without_javascript(site, open_page, name):
    page = await open_page(site, PATHS[name])
    title = await page.title()
    assert title.endswith("pullcache")
    plain = await open_page(site, PATHS[name], java_script_enabled=False)
    assert await plain.title() == title
    await expect(plain.locator("main")).to_be_visible()
    assert (
        await plain.locator("button.copy").count() == 0
        or not await plain.locator("button.copy").first.is_visible()
    )


async def test_a_page_fits_the_smallest_and_the_largest_windows(site, open_page):
    for path, width in (("/images", 320), ("/images", 3840), ("/packages?image=debian:12", 720)):
        page = await open_page(site, path, width=width)
        assert await page.evaluate(
            "() => document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        ), f"{path} at {width}"
