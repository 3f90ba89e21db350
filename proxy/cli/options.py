"""The options that commands share, and how they become a configuration."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from proxy.config import Config, load

_Command = TypeVar("_Command", bound=Callable[..., Any])

no_trunc_option = click.option(
    "--no-trunc",
    "no_trunc",
    is_flag=True,
    help="Cut nothing short, as where nobody reads it on a terminal.",
)


def config_options(command: _Command) -> _Command:
    """Give a command `-c/--config` and `--store`, so that it finds the daemon's store."""
    file = click.option(
        "-c",
        "--config",
        "path",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The configuration file. [default: $PULLCACHE_CONFIG, or none]",
    )
    store = click.option("--store", metavar="DIR", help="The directory of the store.")
    return file(store(command))


def load_config(
    path: Path | None, store: str | None, *, max_size: str | None = None, **overrides: Any
) -> Config:
    """Return the configuration of a command; `flags` are nested as the file is."""
    overrides["store"] = {"path": store, "max_size": max_size}
    return load(path, os.environ, overrides)
