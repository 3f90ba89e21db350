"""A configuration as plain values and as TOML, with secrets redacted."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import fields

from proxy.config.rates import RateSchedule
from proxy.config.schema import Config, Section
from proxy.config.values import Secret


def dump(config: Config) -> dict[str, Any]:
    """Return the configuration as the file would contain it, secrets as "***"."""
    return _section_to_plain(config)


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file with the same meaning, secrets as "***"."""
    return "\n".join(_iter_tables(dump(config), "")) + "\n"


def to_toml_value(value: Any) -> str:
    """Return a value as TOML text. Strings, numbers and arrays are written as in JSON."""
    value = to_plain(value)
    if isinstance(value, dict):
        items = (f"{_toml_key(key)} = {to_toml_value(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    # Unlike JSON, TOML does not allow DEL in a string.
    return json.dumps(value).replace("\x7f", "\\u007f")


def to_plain(value: Any) -> Any:
    """Return a value of the configuration in the types of JSON, secrets as "***"."""
    match value:
        case Section():
            return _section_to_plain(value)
        case Mapping():
            return {name: to_plain(item) for name, item in value.items()}
        case tuple() | list():
            return [to_plain(item) for item in value]
        case RateSchedule():
            return value.plain
        case Secret():
            return value.redacted
        case _:
            return value if type(value) in {bool, int} else str(value)


def _section_to_plain(section: Section) -> dict[str, Any]:
    return {key.encode_name: to_plain(getattr(section, key.name)) for key in fields(section)}


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


def _toml_key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else json.dumps(name)
