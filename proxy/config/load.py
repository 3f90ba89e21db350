"""Load the configuration: merge its sources into plain tables and build one checked `Config`.

Also here: the keys that a reload cannot change, and the check for world-readable secret files.
"""

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo, fields, replace

from proxy.config.dump import to_toml_value
from proxy.config.keys import key_default, table_array_item, unwrap_annotated
from proxy.config.schema import (
    DEFAULT_UPSTREAM,
    DOCKER_HUB_FACTS_URL,
    DOCKER_HUB_URL,
    KNOWN_REGISTRIES,
    RENAMED_KEYS,
    Config,
    FleetSettings,
    Section,
    UpstreamSettings,
)
from proxy.config.values import expand_path, parse_value
from proxy.errors import ConfigError

# Keys of objects that are opened once, at the start: listeners, the log, the store.
RESTART_ONLY_KEYS = {
    "server": (
        "listen",
        "admin_listen",
        "admin_hosts",
        "admin_token_file",
        "admin_tokens",
        "pages",
        "pages_anonymous_read",
        "tracing",
    ),
    "log": ("format",),
    "store": ("path", "group_access"),
    "fleet": tuple(key.name for key in fields(FleetSettings)),
}

COMMAND_LINE = "command line"
# What the packages install, and every command reads unless another file is named.
SYSTEM_FILE = Path("/etc/pullcache/pullcache.toml")

_ENV_PREFIX = "PULLCACHE_"
# Kubernetes sets PULLCACHE_SERVICE_HOST and the like for a service named pullcache.
_IGNORED_VARIABLE = re.compile(r"PULLCACHE_(?:CONFIG|(?:SERVICE_(?:HOST|PORT)|PORT)(?:_.*)?)")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

_UPSTREAM_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::[0-9]{1,5})?")


def find_config_file(path: Path | None, environ: Mapping[str, str]) -> Path | None:
    """Return `path`, or the file in `PULLCACHE_CONFIG`, or that of the system if there is one."""
    if path is None and (named := environ.get("PULLCACHE_CONFIG")):
        path = Path(named)
    if path is None and os.path.lexists(SYSTEM_FILE):
        path = SYSTEM_FILE
    return path


def load(
    path: Path | None,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any],
    *,
    is_root: bool | None = None,
) -> Config:
    """Return the configuration, or raise `ConfigError` "source: key.path: reason (what to do)".

    `path` is what `find_config_file` returns; without one, no file is read. `overrides` come from
    the command line, nested as in the file; a value of None is ignored.
    """
    values: dict[str, Any] = {"upstreams": {DEFAULT_UPSTREAM: {}}}
    if is_root is None:
        is_root = os.geteuid() == 0
    if path is not None:
        _merge(values, _read_toml(path), str(path))
    elif not is_root:
        _merge(values, {"store": {"path": _user_store_path(environ)}}, "default")
    for name, table in _environ_tables(environ, {*values["upstreams"], *KNOWN_REGISTRIES}):
        _merge(values, table, name)
    _merge(values, overrides, COMMAND_LINE)
    for name in values["upstreams"].keys() & KNOWN_REGISTRIES.keys():
        values["upstreams"][name].setdefault("url", KNOWN_REGISTRIES[name])
    if values["upstreams"][DEFAULT_UPSTREAM]["url"] == DOCKER_HUB_URL:
        values["upstreams"][DEFAULT_UPSTREAM].setdefault("facts_url", DOCKER_HUB_FACTS_URL)
    config: Config = _build(Config, values, str(path) if path else COMMAND_LINE, "")
    return config


def keep_restart_only_keys(old: Config, new: Config) -> tuple[Config, list[str]]:
    """Return `new` with the restart-only keys of `old`, and the paths of those that differ."""
    sections: dict[str, Any] = {}
    differing = []
    for name, keys in RESTART_ONLY_KEYS.items():
        before, after = getattr(old, name), getattr(new, name)
        kept = {key: getattr(before, key) for key in keys}
        differing += [f"{name}.{key}" for key in keys if getattr(after, key) != kept[key]]
        sections[name] = replace(after, **kept)
    return replace(new, **sections), differing


def world_readable_files(config: Config) -> list[str]:
    """Return the files with secrets that every local user can read. Blocking (`stat`)."""
    server = config.server
    files = [server.admin_token_file, server.htpasswd, *(server.tls_key or server.tls_certificate)]
    files += [token.file for token in server.admin_tokens]
    files.append(config.notify.key_file)
    files += [config.fleet.token_file, config.fleet.valkey_password_file]
    for upstream in config.upstreams.values():
        files += [upstream.password_file, upstream.docker_config]
    return [file for file in files if file and _is_world_readable(file)]


def _is_world_readable(path: str) -> bool:
    try:
        return bool(expand_path(path).stat().st_mode & stat.S_IROTH)
    except OSError:
        # Reading the file reports the error.
        return False


# Sources.


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def _user_store_path(environ: Mapping[str, str]) -> str:
    base = environ.get("XDG_CACHE_HOME", "")
    home = environ.get("HOME") or str(Path("~").expanduser())
    # XDG Base Directory Specification: a relative path is ignored.
    return f"{base if base.startswith('/') else home + '/.cache'}/pullcache"


def _environ_tables(
    environ: Mapping[str, str], upstreams: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each `PULLCACHE_*` variable with the table that it stands for.

    An empty one counts as unset: compose files and shells pass on variables that are not set.
    """
    variables = {
        name: text
        for name, text in environ.items()
        if text and name.startswith(_ENV_PREFIX) and not _IGNORED_VARIABLE.fullmatch(name)
    }
    if not variables:
        return
    known: dict[str, list[tuple[tuple[str, ...], FieldInfo]]] = {}
    for path, key in _environ_keys(upstreams):
        known.setdefault(variable_name(*path, key.name), []).append((path, key))
    for name, text in variables.items():
        if name not in known:
            renamed = {variable_name(old): variable_name(new) for old, new in RENAMED_KEYS.items()}
            raise _unknown_key(name, name, known, renamed.get(name))
        if len(known[name]) > 1:
            raise ConfigError(f"{name}: matches more than one upstream (set it in the file)")
        ((path, key),) = known[name]
        table: dict[str, Any] = {key.name: _split_text(key, text)}
        for part in reversed(path):
            table = {part: table}
        yield name, table


def _environ_keys(upstreams: Collection[str]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield each key that the environment can set, with the path of its table."""
    for top in fields(Config):
        if isinstance(top.type, type) and issubclass(top.type, Section):
            keys = (key for key in fields(top.type) if not table_array_item(key.type))
            yield from (((top.name,), key) for key in keys)
        elif top.name != "upstreams" and not table_array_item(top.type):
            yield (), top
    for upstream in upstreams:
        yield from ((("upstreams", upstream), key) for key in fields(UpstreamSettings))


def variable_name(*path: str) -> str:
    """Return the variable of the environment that sets a key."""
    return _ENV_PREFIX + re.sub(r"[^A-Z0-9]", "_", "_".join(path).upper())


def _split_text(key: FieldInfo, text: str) -> Any:
    """Return the value that the file would have; commas separate the items of an array or table."""
    kind = unwrap_annotated(key.type)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if get_origin(kind) is dict:
        return {glob.strip(): value for glob, _, value in (part.rpartition("=") for part in parts)}
    if get_origin(kind) is tuple:
        return parts
    if kind is bool:
        return _BOOLEANS.get(text.lower(), text)
    return int(text) if kind is int and re.fullmatch(r"-?[0-9]{1,18}", text) else text


# Merging: every value of every source is parsed, so that errors name the source.


def _merge(values: dict[str, Any], table: Mapping[str, Any], source: str) -> None:
    """Parse `table` and merge it over `values`."""
    _merge_section(Config, values, table, source, "")


def _merge_section(
    section: type[Section], values: dict[str, Any], table: Any, source: str, path: str
) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {path[:-1]}: expected a table (write [{path[:-1]}])")
    known = {key.encode_name: key for key in fields(section)}
    for name, value in table.items():
        here = f"{path}{name}"
        if name not in known:
            raise _unknown_key(f"{source}: {here}", name, known, RENAMED_KEYS.get(here))
        kind = unwrap_annotated(known[name].type)
        if value is None:
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            _merge_section(kind, values.setdefault(name, {}), value, source, f"{here}.")
        elif item := table_array_item(kind):
            values[name] = _parse_array(item, value, source, here)
        elif get_origin(kind) is dict:
            values[name] = _parse_table(kind, values.get(name, {}), value, source, here)
        else:
            values[name] = _parse(known[name], value, source, here)


def _unknown_key(place: str, name: str, known: Iterable[str], new_name: str | None) -> ConfigError:
    """Return the error for a key that does not exist, with a suggestion."""
    known = sorted(known)
    if new_name:
        return ConfigError(f"{place}: was renamed to {new_name}")
    if similar := difflib.get_close_matches(name, known, n=1):
        return ConfigError(f"{place}: no such key (did you mean {similar[0]}?)")
    return ConfigError(f"{place}: no such key (known: {', '.join(known)})")


def _parse_table(
    kind: Any, current: dict[str, Any], table: Any, source: str, path: str
) -> dict[str, Any]:
    """Return the parsed table: sections are merged into `current`, plain values replace it."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{source}: {path}: expected a table (write [{path}])")
    item = get_args(kind)[1]
    if not (isinstance(item, type) and issubclass(item, Section)):
        return {
            name: _convert(value, item, source, f'{path}."{name}"', "")
            for name, value in table.items()
        }
    for name, value in table.items():
        here = f'{path}."{name}"'
        if unquoted := _unquoted_name(item, name, value):
            raise ConfigError(
                f'{source}: {path}.{unquoted}: write the name with quotes: [{path}."{unquoted}"]'
            )
        if _UPSTREAM_NAME.fullmatch(name) is None:
            raise ConfigError(f'{source}: {here}: not a registry name (write "ghcr.io")')
        _merge_section(item, current.setdefault(name, {}), value, source, f"{here}.")
    return current


def _unquoted_name(section: type[Section], name: str, value: Any) -> str | None:
    """Return the name whose dots TOML takes for tables within tables, as in `[upstreams.ghcr.io]`."""
    known = {key.encode_name for key in fields(section)}
    is_split = False
    while isinstance(value, Mapping):
        tables = (one for one in value.items() if isinstance(one[1], Mapping))
        part, value = next((one for one in tables if one[0] not in known), ("", None))
        if part:
            name, is_split = f"{name}.{part}", True
    return name if is_split else None


def _parse_array(item: type[Section], tables: Any, source: str, path: str) -> list[dict[str, Any]]:
    """Return the parsed tables of an array, which replaces that of an earlier source."""
    if not isinstance(tables, list):
        raise ConfigError(f"{source}: {path}: expected an array of tables (write [[{path}]])")
    parsed: list[dict[str, Any]] = [{} for _ in tables]
    for number, (values, table) in enumerate(zip(parsed, tables, strict=True), 1):
        _merge_section(item, values, table, source, f"{path}[{number}].")
    return parsed


def _parse(key: FieldInfo, value: Any, source: str, path: str) -> Any:
    kind = unwrap_annotated(key.type)
    example = ""
    if get_origin(kind) is Literal:
        example = f" (write one of {', '.join(get_args(kind))})"
    elif not key.required:
        example = f" (for instance: {key.encode_name} = {to_toml_value(key_default(key))})"
    return _convert(value, key.type, source, path, example)


def _convert(value: Any, kind: Any, source: str, path: str, example: str) -> Any:
    try:
        return msgspec.convert(value, kind, dec_hook=parse_value)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        if isinstance(error.__cause__, ValueError):
            example = ""  # the messages of our own types say what to write
        reason = (reason[:1].lower() + reason[1:]).replace("`", "")
        raise ConfigError(f"{source}: {path}{place.rstrip('`')}: {reason}{example}") from error


def _build(kind: type[Section], values: Mapping[str, Any], source: str, path: str) -> Any:
    """Build the structs from parsed values. Raises `ConfigError` for missing or clashing keys."""
    arguments = {
        key.name: values[key.encode_name] for key in fields(kind) if key.encode_name in values
    }
    for key in fields(kind):
        inner = unwrap_annotated(key.type)
        here = f"{path}{key.encode_name}"
        if key.encode_name not in values:
            if key.required:
                raise ConfigError(
                    f"{source}: {here}: is missing (for instance: {key.encode_name} = ...)"
                )
        elif isinstance(inner, type) and issubclass(inner, Section):
            arguments[key.name] = _build(inner, values[key.encode_name], source, f"{here}.")
        elif item := table_array_item(inner):
            arguments[key.name] = tuple(
                _build(item, value, source, f"{here}[{number}].")
                for number, value in enumerate(values[key.encode_name], 1)
            )
        elif get_origin(inner) is dict and issubclass(get_args(inner)[1], Section):
            arguments[key.name] = {
                name: _build(get_args(inner)[1], value, source, f'{here}."{name}".')
                for name, value in values[key.encode_name].items()
            }
    try:
        return kind(**arguments)
    except ValueError as error:
        place = f"{source}: {path[:-1]}" if path else source
        raise ConfigError(f"{place}: {error}") from error
