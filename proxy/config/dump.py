"""Showing the configuration: as TOML, as plain values, as JSON Schema, as a list of its keys."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, asdict, fields

from proxy.config.schema import Config, Section
from proxy.config.values import Secret, schema_of


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file. `default` is TOML text; None if the key must be given."""

    path: str
    default: str | None
    description: str


def iter_keys() -> Iterator[Key]:
    """Yield every key that is accepted; an upstream's name is written `<name>`, an array of tables as one."""
    yield from _iter_keys(Config, "")


def _iter_keys(section: type[Section], path: str) -> Iterator[Key]:
    for key in fields(section):
        kind = element(key.type)
        here = f"{path}{key.name}"
        inner = kind if get_origin(kind) is not dict else get_args(kind)[1]
        if item := array_of(kind):
            yield from _iter_keys(item, f"{here}.")
        elif isinstance(inner, type) and issubclass(inner, Section):
            yield from _iter_keys(inner, f"{here}." if inner is kind else f"{here}.<name>.")
        else:
            yield Key(here, None if key.required else text_of(default_of(key)), _description(key))


def default_of(key: FieldInfo) -> Any:
    """Return the default of `key`, made if need be, or `msgspec.NODEFAULT`."""
    return key.default if key.default_factory is msgspec.NODEFAULT else key.default_factory()


def element(kind: Any) -> Any:
    """Return the type under an `Annotated`."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def array_of(kind: Any) -> type[Section] | None:
    """Return the tables that a key is an array of, None if it is something else."""
    kind = element(kind)
    item = get_args(kind)[0] if get_origin(kind) is tuple else None
    return item if isinstance(item, type) and issubclass(item, Section) else None


def _description(key: FieldInfo) -> str:
    metas = [meta for meta in get_args(key.type)[1:] if isinstance(meta, msgspec.Meta)]
    return metas[0].description or "" if metas else ""


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as the file would hold it, secrets as "***"."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    match value:
        case Section():
            return {name: _plain(item) for name, item in asdict(value).items()}
        case Mapping():
            return {name: _plain(item) for name, item in value.items()}
        case tuple() | list():
            return [_plain(item) for item in value]
        case Secret():
            return value.shown
        case _:
            return value if type(value) in {bool, int} else str(value)


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file that means the same, but for the secrets."""
    return "\n".join(_tables(dump(config), "")) + "\n"


def _tables(table: Mapping[str, Any], path: str) -> Iterator[str]:
    plain = {name: value for name, value in table.items() if not _has_tables(value)}
    if path and (plain or not table):
        yield f"\n[{path}]"
    for name, value in plain.items():
        yield f"{_key_text(name)} = {text_of(value)}"
    for name, value in table.items():
        here = f"{path}.{_key_text(name)}" if path else name
        if isinstance(value, dict):
            yield from _tables(value, here)
        elif _has_tables(value):
            for item in value:
                yield f"\n[[{here}]]"
                yield from (f"{_key_text(key)} = {text_of(one)}" for key, one in item.items())


def _has_tables(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def text_of(value: Any) -> str:
    """Return `value` as TOML text (JSON's strings, numbers and lists are TOML's too)."""
    value = _plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key_text(k)} = {text_of(v)}" for k, v in value.items()) + "}"
    return json.dumps(value).replace("\x7f", "\\u007f")


def _key_text(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _section_schema(Config)


def _section_schema(section: type[Section]) -> dict[str, Any]:
    properties = {}
    for key in fields(section):
        properties[key.name] = _schema(element(key.type)) | _constraints(key)
        if description := _description(key):
            properties[key.name]["description"] = description
    return {
        "type": "object",
        "description": section.__doc__ or "",
        "properties": properties,
        "additionalProperties": False,
    }


def _constraints(key: FieldInfo) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for meta in get_args(key.type)[1:]:
        bounds = {"minimum": meta.ge, "maximum": meta.le, "minItems": meta.min_length}
        found |= {name: bound for name, bound in bounds.items() if bound is not None}
    default = default_of(key)
    if default is not msgspec.NODEFAULT and not isinstance(default, Section):
        found["default"] = _plain(default)
    return found


def _schema(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1])}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0])}
    if isinstance(kind, type) and issubclass(kind, Section):
        return _section_schema(kind)
    return schema_of(kind) or msgspec.json.schema(kind)
