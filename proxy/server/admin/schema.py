"""`/api/v1/openapi.json`: the OpenAPI description of the admin API."""

import asyncio
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from proxy.server.admin.api import AdminRequest, Route


def routes() -> list[Route]:
    """Return the route."""
    return [Route("GET", "/api/v1/openapi.json", _get_openapi)]


@cache
def load_openapi() -> dict[str, Any]:
    """Return the OpenAPI document."""
    content = files("proxy.server.admin").joinpath("openapi.json").read_bytes()
    document: dict[str, Any] = msgspec.json.decode(content)
    return document


async def _get_openapi(_request: AdminRequest) -> dict[str, Any]:
    return await asyncio.to_thread(load_openapi)
