"""Validation of documents against the OpenAPI description of the admin API."""

from openapi_schema_validator import OAS31Validator

from proxy.server.admin import schema

# Read on import: reading the file inside a test would block the event loop.
_COMPONENTS = schema.load_openapi()["components"]


def validate(document: object, schema_name: str) -> None:
    """Raise unless `document` has the form of this schema of the description."""
    reference = {"$ref": f"#/components/schemas/{schema_name}", "components": _COMPONENTS}
    OAS31Validator(reference).validate(document)
