"""`pullcache serve`: run the daemon."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy import __version__
from proxy.cli.display.text import format_bytes
from proxy.cli.options import config_options, load_config
from proxy.config.schema import KNOWN_REGISTRIES
from proxy.config.values import Address

if TYPE_CHECKING:
    from proxy.app import DaemonInfo


def _parse_upstreams(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> Mapping[str, Mapping[str, str]]:
    upstreams: dict[str, dict[str, str]] = {}
    for text in texts:
        name, equals, url = text.partition("=")
        if not name or (equals and not url):
            raise click.BadParameter(f"{text!r} is not NAME=URL (write ghcr.io=https://ghcr.io)")
        if not url and name not in KNOWN_REGISTRIES:
            raise click.BadParameter(f"{name!r} needs its URL (write {name}=https://{name})")
        upstreams[name] = {"url": url} if url else {}
    return upstreams


@click.command()
@config_options
@click.option(
    "--listen",
    metavar="ADDR",
    multiple=True,
    help="Address to listen on, host:port. May be repeated.",
)
@click.option("--max-size", metavar="SIZE", help='Maximum size of the store: "50GB", "80%".')
@click.option(
    "--upstream",
    "upstreams",
    metavar="NAME[=URL]",
    multiple=True,
    callback=_parse_upstreams,
    help="Upstream registry; a well-known one needs no URL. May be repeated.",
)
@click.option(
    "--offline", is_flag=True, help="Never connect to upstream; serve cached content only."
)
@click.option(
    "--log-format",
    type=click.Choice(("auto", "json", "console")),
    metavar="FORMAT",
    help='Log format: "json", "console", or "auto", which is console on a terminal, else JSON.',
)
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error")),
    metavar="LEVEL",
    help="Minimum severity to log: debug, info, warning or error.",
)
def serve(
    *,
    path: Path | None,
    store: str | None,
    listen: tuple[str, ...],
    max_size: str | None,
    upstreams: Mapping[str, Mapping[str, str]],
    offline: bool,
    log_format: str | None,
    log_level: str | None,
) -> None:
    """Run the cache daemon in the foreground.

    Stops on SIGTERM or Ctrl-C, rereads its configuration on SIGHUP. Options override the
    configuration file.

    \b
    Examples:
      pullcache serve
      pullcache serve --listen :5000 --max-size 200GB
      pullcache serve --upstream ghcr.io --upstream quay.io
    """
    load = partial(
        load_config,
        path,
        store,
        offline=offline or None,
        server={"listen": list(listen) or None},
        log={"format": log_format, "level": log_level},
        max_size=max_size,
        upstreams=upstreams,
    )
    from proxy.daemon import run  # noqa: PLC0415 - imports aiohttp

    run(load, print_banner)


def print_banner(info: "DaemonInfo") -> None:
    """Print to stdout where the daemon listens, and the command for its clients, in short lines."""
    scheme = "https" if info.is_tls else "http"
    tcp = [address for address in info.addresses if not address.startswith("unix:")]
    urls = [f"{scheme}://{one}" if one in tcp else one for one in info.addresses]
    local = f"{scheme}://{Address(tcp[0]).local_address}" if tcp else urls[0]
    used, limit = format_bytes(info.used), format_bytes(info.max_size)
    upstreams = [
        name if url == KNOWN_REGISTRIES.get(name) else f"{name} = {url}"
        for name, url in info.upstreams.items()
    ]
    click.echo(f"pullcache {__version__}")
    for name, values in (
        ("listening", urls),
        ("store", [str(info.store), f"{used} of {limit} used"]),
        ("upstreams", upstreams),
        ("metrics", [f"{local}/metrics"]),
        ("clients", ["pullcache client-config docker"]),
        ("pages", ["pullcache ui"] if info.has_pages else []),
    ):
        for number, value in enumerate(values):
            click.echo(f"  {'' if number else name:<9}  {value}")
