"""Where the value of each key comes from: the default, a variable of the environment, or what is configured."""

from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import FieldInfo, fields

from proxy.config.dump import to_toml_value
from proxy.config.load import variable_name
from proxy.config.schema import Config, Section


class KeyOrigin(msgspec.Struct, frozen=True):
    """A key with its value as TOML, secrets as `***`; `default` is empty if there is none.

    `source` is `default`, the name of a variable, or `configured`: in the file, or by an option.
    """

    key: str
    value: str
    default: str
    source: str


def describe_origins(config: Config, environ: Mapping[str, str]) -> list[KeyOrigin]:
    """Return all keys that apply, in the order of the schema, those of upstreams by name."""
    return [*_iter_section(config, "", environ)]


def _iter_section(section: Section, path: str, environ: Mapping[str, str]) -> Iterator[KeyOrigin]:
    for info in fields(section):
        value, key = getattr(section, info.name), f"{path}{info.encode_name}"
        if isinstance(value, Section):
            yield from _iter_section(value, f"{key}.", environ)
        elif isinstance(value, Mapping) and any(isinstance(one, Section) for one in value.values()):
            for name, one in value.items():
                yield from _iter_section(one, f'{key}."{name}".', environ)
        else:
            yield _describe(key, value, info, environ)


def _describe(key: str, value: object, info: FieldInfo, environ: Mapping[str, str]) -> KeyOrigin:
    default = "" if info.required else to_toml_value(_default_of(info))
    shown = to_toml_value(value)
    variable = variable_name(key.replace('"', ""))
    source = "default" if shown == default else "configured"
    if environ.get(variable):
        source = variable
    return KeyOrigin(key, shown, default, source)


def _default_of(info: FieldInfo) -> object:
    if info.default_factory is not msgspec.NODEFAULT:
        return info.default_factory()
    return info.default
