"""The configuration: a schema of frozen structs with defaults and descriptions, loaded and checked.

`schema` has every key. `load` takes each value from the last of default, TOML file, environment
(`PULLCACHE_<SECTION>_<KEY>`) and command line, and parses it there, so that an error names source,
key and remedy, and the rest of the program gets bytes and seconds, never "50GB".
"""

from proxy.config.dump import dump, to_toml
from proxy.config.keys import iter_keys, json_schema
from proxy.config.load import (
    find_config_file,
    keep_restart_only_keys,
    load,
    world_readable_files,
)
from proxy.config.schema import (
    Config,
    FetchSettings,
    FleetSettings,
    LogSettings,
    ManifestsSettings,
    NotifySettings,
    PolicySettings,
    PreloadSettings,
    RuleSettings,
    ServerSettings,
    StatisticsSettings,
    StoreSettings,
    UpstreamSettings,
)
from proxy.config.values import (
    Address,
    Duration,
    ProxyUrl,
    RegistryUrl,
    Secret,
    Size,
    StoreLimit,
    WebhookUrl,
)

__all__ = [
    "Address",
    "Config",
    "Duration",
    "FetchSettings",
    "FleetSettings",
    "LogSettings",
    "ManifestsSettings",
    "NotifySettings",
    "PolicySettings",
    "PreloadSettings",
    "ProxyUrl",
    "RegistryUrl",
    "RuleSettings",
    "Secret",
    "ServerSettings",
    "Size",
    "StatisticsSettings",
    "StoreLimit",
    "StoreSettings",
    "UpstreamSettings",
    "WebhookUrl",
    "dump",
    "find_config_file",
    "iter_keys",
    "json_schema",
    "keep_restart_only_keys",
    "load",
    "to_toml",
    "world_readable_files",
]
