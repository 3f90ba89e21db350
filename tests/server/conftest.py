"""Fixtures for tests of the server."""

from typing import Any

import pytest

from proxy.server.middleware import Middleware


@pytest.fixture
def usual(monkeypatch) -> list[str]:
    """The paths of requests that went the usual way."""
    went: list[str] = []
    handle = Middleware.__call__

    async def noted(self: Middleware, asked: Any) -> Any:
        went.append(asked.raw_path)
        return await handle(self, asked)

    monkeypatch.setattr(Middleware, "__call__", noted)
    return went
