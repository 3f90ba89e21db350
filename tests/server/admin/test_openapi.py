"""The OpenAPI description of the admin API matches its routes, errors and responses."""

import asyncio

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from proxy.cli.api_client import AdminClient
from proxy.errors import NotFoundError
from proxy.server.admin import schema
from tests.support.openapi import validate

HTTP_METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}
DOCUMENT = schema.load_openapi()


def test_the_description_is_valid_openapi():
    OpenAPIV31SpecValidator(DOCUMENT).validate()


async def test_the_description_has_exactly_the_routes(program):
    described_routes = [
        (method.upper(), path)
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
        if method in HTTP_METHODS
    ]
    assert sorted(described_routes) == sorted(program.routes)


def test_every_operation_has_a_summary_and_an_error_response():
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["operationId"]
            assert operation["responses"]["default"] == {"$ref": "#/components/responses/Error"}


async def test_the_description_is_served(program):
    client = AdminClient(program.root)
    assert await asyncio.to_thread(client.get, "/api/v1/openapi.json") == DOCUMENT


async def test_responses_match_their_schemas(registry, program):
    await program.pull(registry.add_image(layers=[b"x" * 1000]))
    client = AdminClient(program.root)
    validate(await asyncio.to_thread(client.get, "/api/v1/status"), "DaemonStatus")
    validate(await asyncio.to_thread(client.get, "/api/v1/offline"), "OfflineState")
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(client.get, "/api/v1/nothing")
