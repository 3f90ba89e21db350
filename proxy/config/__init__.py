"""The configuration: its schema, its defaults and its documentation are the same frozen structs.

A value comes from the last of: default, TOML file, environment (`PULLCACHE_<SECTION>_<KEY>`),
command line. It is parsed and checked where it enters, so that an error names its source, its key
path and what to do, and so that the program sees bytes and seconds, never "50GB".
"""

from proxy.config.dump import dump, iter_keys, json_schema, to_toml
from proxy.config.load import keep_restart_only_keys, load, world_readable_files
from proxy.config.schema import (
    Config,
    FetchSettings,
    LogSettings,
    ManifestsSettings,
    PreloadSettings,
    ServerSettings,
    StoreSettings,
    UpstreamSettings,
)
from proxy.config.values import Address, Duration, ProxyUrl, RegistryUrl, Secret, Size, StoreLimit

__all__ = [
    "Address",
    "Config",
    "Duration",
    "FetchSettings",
    "LogSettings",
    "ManifestsSettings",
    "PreloadSettings",
    "ProxyUrl",
    "RegistryUrl",
    "Secret",
    "ServerSettings",
    "Size",
    "StoreLimit",
    "StoreSettings",
    "UpstreamSettings",
    "dump",
    "iter_keys",
    "json_schema",
    "keep_restart_only_keys",
    "load",
    "to_toml",
    "world_readable_files",
]
