"""Programs that serve pages, and browsers for them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from proxy.images import table
from proxy.server.pages import recent_pages
from tests.support.page_client import PageClient
from tests.support.program import Program

MakeProgram = Callable[..., Awaitable[Program]]

SECRET = "s3cret-of-the-operator"
READ_SECRET = "s3cret-of-the-reader"


@pytest.fixture(autouse=True)
def _patient_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any table of images for a quick one, however busy the machine is."""
    monkeypatch.setattr(table, "QUICK_BUILD_TIME", 30.0)


@pytest.fixture(autouse=True)
def _always_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render each page anew, also the third time within a second."""
    monkeypatch.setattr(recent_pages, "REUSE_TIME", 0.0)


@pytest.fixture
async def make_client() -> AsyncIterator[Callable[..., Awaitable[PageClient]]]:
    """Return a function that returns a browser for a program's pages."""
    async with AsyncExitStack() as stack:

        async def make(program: Program, **headers: str) -> PageClient:
            client = PageClient(program.admin_addresses[0], **headers)
            return await stack.enter_async_context(client)

        yield make


@pytest.fixture
async def open_program(make_program: MakeProgram) -> Program:
    """A program whose pages need no login: on loopback, without a token."""
    return await make_program(server={"admin_listen": ["127.0.0.1:0"]})


@pytest.fixture
def token_settings(tmp_path):
    """Settings of an admin listener with two tokens: one may operate, one may read."""
    (tmp_path / "token").write_text(SECRET)
    (tmp_path / "read-token").write_text(READ_SECRET)
    return {
        "admin_listen": ["127.0.0.1:0"],
        "admin_token_file": str(tmp_path / "token"),
        "admin_tokens": [{"name": "reader", "file": str(tmp_path / "read-token")}],
    }


@pytest.fixture
async def closed_program(make_program: MakeProgram, token_settings: dict[str, Any]) -> Program:
    """A program whose pages need a login."""
    return await make_program(server=token_settings)


@pytest.fixture
async def client(
    open_program: Program, make_client: Callable[..., Awaitable[PageClient]]
) -> PageClient:
    """A browser at the pages that need no login."""
    return await make_client(open_program)
