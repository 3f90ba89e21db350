"""Options that several commands share, and the configuration they result in."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from proxy.config import Config, load

_Command = TypeVar("_Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
no_trunc_option = click.option(
    "--no-trunc", "no_trunc", is_flag=True, help="Do not truncate output on a terminal."
)


def config_options(command: _Command) -> _Command:
    """Add `-c/--config` and `--store`, so that the command finds the daemon's store."""
    file = click.option(
        "-c",
        "--config",
        "path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Configuration file. [default: $PULLCACHE_CONFIG, or none]",
    )
    store = click.option("--store", metavar="DIR", help="Store directory; overrides store.path.")
    return file(store(command))


def load_config(
    path: Path | None, store: str | None, *, max_size: str | None = None, **overrides: Any
) -> Config:
    """Return the configuration for a command; `overrides` are nested as in the file."""
    overrides["store"] = {"path": store, "max_size": max_size}
    return load(path, os.environ, overrides)
