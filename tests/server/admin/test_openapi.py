"""The description of the admin API against its routes, its errors and its answers."""

import asyncio

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from proxy.cli.api_client import AdminClient
from proxy.errors import NotFoundError
from proxy.server.admin import schema as admin_schema

METHODS = {"get", "put", "post", "delete", "patch", "head", "options"}
DOCUMENT = admin_schema.load_openapi()


def check(answer: object, name: str) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    OAS31Validator(schema).validate(answer)


def test_it_is_valid_openapi():
    OpenAPIV31SpecValidator(DOCUMENT).validate()


async def test_it_describes_each_route_and_no_other(program):
    described = [
        (method.upper(), path)
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
        if method in METHODS
    ]
    assert sorted(described) == sorted(program.routes)


def test_every_operation_says_what_it_does_and_how_it_fails():
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["operationId"]
            assert operation["responses"]["default"] == {"$ref": "#/components/responses/Error"}


async def test_it_is_served(program):
    client = AdminClient(program.root)
    assert await asyncio.to_thread(client.get, "/api/v1/openapi.json") == DOCUMENT


async def test_answers_are_as_it_says(registry, program):
    await program.pull(registry.add_image(layers=[b"x" * 1000]))
    client = AdminClient(program.root)
    check(await asyncio.to_thread(client.get, "/api/v1/status"), "Status")
    check(await asyncio.to_thread(client.get, "/api/v1/offline"), "Offline")
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(client.get, "/api/v1/nothing")
