"""Validation of documents against the OpenAPI description of the admin API."""

from openapi_schema_validator import OAS31Validator

from proxy.server.admin import schema


def validate(document: object, schema_name: str) -> None:
    """Raise unless `document` has the form of this schema of the description."""
    components = schema.load_openapi()["components"]
    reference = {"$ref": f"#/components/schemas/{schema_name}", "components": components}
    OAS31Validator(reference).validate(document)
