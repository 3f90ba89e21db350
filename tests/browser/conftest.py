"""Chromium at the pages of a filled cache. A test fails if the browser complains about anything."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    async_playwright,
)

from proxy.images import table
from tests.browser.content import fill
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

CHROMIUM = Path("/usr/bin/chromium")
HAS_CHROMIUM = CHROMIUM.exists()
# The sandbox of Chromium does not run as root.
_ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP cache.example 127.0.0.1"]
OpenPage = Callable[..., Awaitable[Page]]

# Messages for a page whose status is an error, which the test asked for, and at an address without TLS.
_EXPECTED = (
    "Failed to load resource: the server responded with a status of 4",
    "The Cross-Origin-Opener-Policy header has been ignored",
)


@pytest.fixture(autouse=True)
def _patient_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any table of images for a quick one, however busy the machine is."""
    monkeypatch.setattr(table, "QUICK_BUILD_TIME", 30.0)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    if not HAS_CHROMIUM:
        pytest.skip("needs Debian's chromium: apt install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=_ARGUMENTS, env={"LANG": "en_US.UTF-8"}
        )
        yield browser
        await browser.close()


@pytest.fixture
async def site(make_program: Callable[..., Awaitable[Program]], registry: FakeRegistry) -> Program:
    """A cache with images, whose pages need no login."""
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    await fill(program, registry)
    return program


@pytest.fixture
async def open_page(browser: Browser) -> AsyncIterator[OpenPage]:
    """Return a function that opens a page of a program in a window of its own.

    At the end, no page may have reported an error, broken its policy, or asked another host for anything.
    """
    complaints: list[str] = []
    async with AsyncExitStack() as stack:

        async def open_path(
            program: Program | str,
            path: str,
            *,
            scheme: Any = "light",
            width: int = 1440,
            context: BrowserContext | None = None,
            **options: Any,
        ) -> Page:
            address = program if isinstance(program, str) else program.admin_addresses[0]
            if context is None:
                context = await browser.new_context(
                    color_scheme=scheme,
                    viewport={"width": width, "height": 900},
                    reduced_motion="reduce",
                    **options,
                )
                stack.push_async_callback(context.close)
            page = await context.new_page()
            host = address.rpartition(":")[0]

            def on_console(message: ConsoleMessage) -> None:
                is_expected = message.text.startswith(_EXPECTED)
                if message.type in ("error", "warning") and not is_expected:
                    complaints.append(f"{path}: {message.text}")

            def on_request(request: Request) -> None:
                if urlsplit(request.url).hostname != host:
                    complaints.append(f"{path}: foreign request: {request.url}")

            page.on("console", on_console)
            page.on("pageerror", lambda error: complaints.append(f"{path}: {error}"))
            page.on("request", on_request)
            await page.goto(f"http://{address}{path}", wait_until="load")
            return page

        yield open_path
    assert complaints == []
