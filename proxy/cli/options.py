"""Options that several commands share, and the configuration they result in."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from proxy.cli.api_client import AdminClient, open_admin_client
from proxy.config import Config, Duration, find_config_file, load
from proxy.config.load import SYSTEM_FILE
from proxy.errors import ProxyError

# Seconds that a completion waits for the daemon, and the images that it offers.
COMPLETION_TIMEOUT = 1.0
MAX_COMPLETIONS = 50

_Command = TypeVar("_Command", bound=Callable[..., Any])


class DurationParameter(click.ParamType[Duration]):
    """The type of options that take a duration, such as `7d`."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Duration:
        """Return the duration in `7d` or `12h`."""
        if isinstance(value, Duration):
            return value
        try:
            return Duration.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


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
        help="Configuration file. [default: $PULLCACHE_CONFIG, or /etc/pullcache/pullcache.toml]",
    )
    store = click.option("--store", metavar="DIR", help="Store directory; overrides store.path.")
    return file(store(command))


def load_config(
    path: Path | None, store: str | None, *, max_size: str | None = None, **overrides: Any
) -> Config:
    """Return the configuration for a command; `overrides` are nested as in the file."""
    overrides["store"] = {"path": store, "max_size": max_size}
    return load(find_config_file(path, os.environ), os.environ, overrides)


def complete_images(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the stored images whose names begin with `incomplete`, as the running daemon knows."""
    try:
        config = load_config(ctx.params.get("path"), ctx.params.get("store"))
        with open_admin_client(config, allow_embedded=False, timeout=COMPLETION_TIMEOUT) as api:
            found = api.stream(
                "GET", "/api/v1/images", filter=f"{incomplete}*", limit=MAX_COMPLETIONS
            )
            return [image["name"] for image in found]
    except (ProxyError, OSError):
        return []


@contextmanager
def open_client(
    path: Path | None, store: str | None, *, creates_store: bool = False
) -> Iterator[AdminClient]:
    """Yield a client of the daemon on the store of the configuration, or of one in this process.

    In the second case, says on stderr that the system's file was read, unless the user named it.
    Raises as `load_config` and `open_admin_client` do.
    """
    config, file = load_config(path, store), find_config_file(path, os.environ)
    is_named = path or os.environ.get("PULLCACHE_CONFIG")

    def explain() -> None:
        if file == SYSTEM_FILE and not is_named:
            click.echo(f"no daemon runs on {config.store.path}, the store of {file}", err=True)

    with open_admin_client(config, creates_store=creates_store, on_embed=explain) as client:
        yield client
