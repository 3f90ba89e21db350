"""Showing the configuration: as TOML, as plain values, as JSON Schema, as a list of its keys."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, asdict, fields

from proxy.config.schema import Config, Section
from proxy.config.values import Secret, value_schema


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of the file. `default` is TOML text; None if the key must be given."""

    path: str
    default: str | None
    description: str


def iter_keys() -> Iterator[ConfigKey]:
    """Yield every key that is accepted; an upstream's name is written `<name>`, an array of tables as one."""
    yield from _iter_keys(Config, "")


def _iter_keys(section: type[Section], path: str) -> Iterator[ConfigKey]:
    for key in fields(section):
        kind = unwrap_annotated(key.type)
        here = f"{path}{key.name}"
        inner = kind if get_origin(kind) is not dict else get_args(kind)[1]
        if item := table_array_item(kind):
            yield from _iter_keys(item, f"{here}.")
        elif isinstance(inner, type) and issubclass(inner, Section):
            yield from _iter_keys(inner, f"{here}." if inner is kind else f"{here}.<name>.")
        else:
            yield ConfigKey(
                here, None if key.required else to_toml_value(key_default(key)), _description(key)
            )


def key_default(key: FieldInfo) -> Any:
    """Return the default of `key`, made if need be, or `msgspec.NODEFAULT`."""
    return key.default if key.default_factory is msgspec.NODEFAULT else key.default_factory()


def unwrap_annotated(kind: Any) -> Any:
    """Return the type under an `Annotated`."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def table_array_item(kind: Any) -> type[Section] | None:
    """Return the tables that a key is an array of, None if it is something else."""
    kind = unwrap_annotated(kind)
    item = get_args(kind)[0] if get_origin(kind) is tuple else None
    return item if isinstance(item, type) and issubclass(item, Section) else None


def _description(key: FieldInfo) -> str:
    metas = [meta for meta in get_args(key.type)[1:] if isinstance(meta, msgspec.Meta)]
    return metas[0].description or "" if metas else ""


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as the file would hold it, secrets as "***"."""
    return {name: _to_plain(value) for name, value in asdict(config).items()}


def _to_plain(value: Any) -> Any:
    match value:
        case Section():
            return {name: _to_plain(item) for name, item in asdict(value).items()}
        case Mapping():
            return {name: _to_plain(item) for name, item in value.items()}
        case tuple() | list():
            return [_to_plain(item) for item in value]
        case Secret():
            return value.redacted
        case _:
            return value if type(value) in {bool, int} else str(value)


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file that means the same, but for the secrets."""
    return "\n".join(_iter_tables(dump(config), "")) + "\n"


def _iter_tables(table: Mapping[str, Any], path: str) -> Iterator[str]:
    plain = {name: value for name, value in table.items() if not _has_tables(value)}
    if path and (plain or not table):
        yield f"\n[{path}]"
    for name, value in plain.items():
        yield f"{_toml_key(name)} = {to_toml_value(value)}"
    for name, value in table.items():
        here = f"{path}.{_toml_key(name)}" if path else name
        if isinstance(value, dict):
            yield from _iter_tables(value, here)
        elif _has_tables(value):
            for item in value:
                yield f"\n[[{here}]]"
                yield from (f"{_toml_key(key)} = {to_toml_value(one)}" for key, one in item.items())


def _has_tables(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def to_toml_value(value: Any) -> str:
    """Return `value` as TOML text (JSON's strings, numbers and lists are TOML's too)."""
    value = _to_plain(value)
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{_toml_key(k)} = {to_toml_value(v)}" for k, v in value.items()) + "}"
        )
    return json.dumps(value).replace("\x7f", "\\u007f")


def _toml_key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _section_schema(Config)


def _section_schema(section: type[Section]) -> dict[str, Any]:
    properties = {}
    for key in fields(section):
        properties[key.name] = _type_schema(unwrap_annotated(key.type)) | _key_constraints(key)
        if description := _description(key):
            properties[key.name]["description"] = description
    return {
        "type": "object",
        "description": section.__doc__ or "",
        "properties": properties,
        "additionalProperties": False,
    }


def _key_constraints(key: FieldInfo) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for meta in get_args(key.type)[1:]:
        bounds = {"minimum": meta.ge, "maximum": meta.le, "minItems": meta.min_length}
        found |= {name: bound for name, bound in bounds.items() if bound is not None}
    default = key_default(key)
    if default is not msgspec.NODEFAULT and not isinstance(default, Section):
        found["default"] = _to_plain(default)
    return found


def _type_schema(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _type_schema(get_args(kind)[1])}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _type_schema(get_args(kind)[0])}
    if isinstance(kind, type) and issubclass(kind, Section):
        return _section_schema(kind)
    return value_schema(kind) or msgspec.json.schema(kind)
