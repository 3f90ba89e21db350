"""The keys of the configuration file, derived from the schema: one by one, or as JSON Schema."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields

from proxy.config.dump import to_plain, to_toml_value
from proxy.config.schema import Config, Section
from proxy.config.values import value_schema


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of the file. `default` is TOML text, None if the key is required."""

    path: str
    default: str | None
    description: str


def iter_keys() -> Iterator[ConfigKey]:
    """Yield every key once; `<name>` stands for an upstream's name, array indexes are omitted."""
    yield from _iter_keys(Config, "")


def _iter_keys(section: type[Section], path: str) -> Iterator[ConfigKey]:
    for key in fields(section):
        kind = unwrap_annotated(key.type)
        here = f"{path}{key.encode_name}"
        inner = kind if get_origin(kind) is not dict else get_args(kind)[1]
        if item := table_array_item(kind):
            yield from _iter_keys(item, f"{here}.")
        elif isinstance(inner, type) and issubclass(inner, Section):
            yield from _iter_keys(inner, f"{here}." if inner is kind else f"{here}.<name>.")
        else:
            yield ConfigKey(
                here, None if key.required else to_toml_value(key_default(key)), _description(key)
            )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _section_schema(Config)


def _section_schema(section: type[Section]) -> dict[str, Any]:
    properties = {}
    for key in fields(section):
        properties[key.encode_name] = _type_schema(unwrap_annotated(key.type)) | _key_constraints(
            key
        )
        if description := _description(key):
            properties[key.encode_name]["description"] = description
    return {
        "type": "object",
        "description": section.__doc__ or "",
        "properties": properties,
        "additionalProperties": False,
    }


def _key_constraints(key: FieldInfo) -> dict[str, Any]:
    constraints: dict[str, Any] = {}
    for meta in get_args(key.type)[1:]:
        bounds = {"minimum": meta.ge, "maximum": meta.le, "minItems": meta.min_length}
        constraints |= {name: bound for name, bound in bounds.items() if bound is not None}
    default = key_default(key)
    if default is not msgspec.NODEFAULT and not isinstance(default, Section):
        constraints["default"] = to_plain(default)
    return constraints


def _type_schema(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _type_schema(get_args(kind)[1])}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _type_schema(get_args(kind)[0])}
    if isinstance(kind, type) and issubclass(kind, Section):
        return _section_schema(kind)
    return value_schema(kind) or msgspec.json.schema(kind)


def key_default(key: FieldInfo) -> Any:
    """Return the default of `key`, or `msgspec.NODEFAULT`."""
    return key.default if key.default_factory is msgspec.NODEFAULT else key.default_factory()


def unwrap_annotated(kind: Any) -> Any:
    """Return the type inside an `Annotated`."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def table_array_item(kind: Any) -> type[Section] | None:
    """Return the section that an array of tables consists of, None for any other type."""
    kind = unwrap_annotated(kind)
    item = get_args(kind)[0] if get_origin(kind) is tuple else None
    return item if isinstance(item, type) and issubclass(item, Section) else None


def _description(key: FieldInfo) -> str:
    metas = [meta for meta in get_args(key.type)[1:] if isinstance(meta, msgspec.Meta)]
    return metas[0].description or "" if metas else ""
