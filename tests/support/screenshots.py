"""Makes the pictures of the pages in `docs/images`, from a cache with plausible images.

    .venv/bin/python -m tests.support.screenshots

It needs Debian's chromium. Each picture is a PNG of at most 150 kB.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

import uvloop
from playwright.async_api import async_playwright

from tests.browser.content import fill
from tests.browser.paths import PICTURES
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

TARGET = Path(__file__).parents[2] / "docs" / "images"
MAX_PICTURE_SIZE = 150_000
_WINDOW = {"width": 1200, "height": 760}


async def make(target: Path = TARGET) -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as directory:
        async with FakeRegistry() as registry, async_playwright() as playwright:
            program = Program(
                Path(directory) / "store", registry, server={"admin_listen": ["127.0.0.1:0"]}
            )
            await program.start()
            await fill(program, registry, hostile=False)
            browser = await playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox"]
            )
            page = await browser.new_page(viewport=_WINDOW, reduced_motion="reduce")  # type: ignore[arg-type]
            for name, path in PICTURES.items():
                await page.goto(f"http://{program.admin_addresses[0]}{path}")
                picture = await page.screenshot(clip={"x": 0, "y": 0, **_WINDOW})  # type: ignore[arg-type]
                assert len(picture) <= MAX_PICTURE_SIZE, f"{name} has {len(picture)} bytes"
                await asyncio.to_thread((target / f"{name}.png").write_bytes, picture)
                sys.stdout.write(f"{name}: {len(picture)} bytes\n")
            await browser.close()
            await program.stop()


if __name__ == "__main__":
    TARGET.mkdir(parents=True, exist_ok=True)
    uvloop.run(make())
