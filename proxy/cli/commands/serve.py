"""`pullcache serve`: the daemon."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy import __version__
from proxy.cli.display.text import format_bytes
from proxy.cli.options import config_options, load_config
from proxy.config.values import Address

if TYPE_CHECKING:
    from proxy.app import DaemonInfo


def _parse_upstreams(
    _context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> Mapping[str, Mapping[str, str]]:
    upstreams = {}
    for text in texts:
        name, equals, url = text.partition("=")
        if not (name and equals and url):
            raise click.BadParameter(f"{text!r} is not NAME=URL, as ghcr.io=https://ghcr.io")
        upstreams[name] = {"url": url}
    return upstreams


@click.command()
@config_options
@click.option("--listen", metavar="ADDR", multiple=True, help="host:port; may be repeated.")
@click.option("--max-size", metavar="SIZE", help='The most the store may hold: "50GB", "80%".')
@click.option(
    "--upstream",
    "upstreams",
    metavar="NAME=URL",
    multiple=True,
    callback=_parse_upstreams,
    help="A registry to ask; may be repeated.",
)
@click.option("--offline", is_flag=True, help="Never dial out; serve what is cached.")
@click.option("--log-format", type=click.Choice(("auto", "json", "console")))
def serve(
    *,
    path: Path | None,
    store: str | None,
    listen: tuple[str, ...],
    max_size: str | None,
    upstreams: Mapping[str, Mapping[str, str]],
    offline: bool,
    log_format: str | None,
) -> None:
    """Run the cache in the foreground until SIGTERM or Ctrl-C."""
    load = partial(
        load_config,
        path,
        store,
        offline=offline or None,
        server={"listen": list(listen) or None},
        log={"format": log_format},
        max_size=max_size,
        upstreams=upstreams,
    )
    from proxy.daemon import run  # noqa: PLC0415 - brings aiohttp, which only the daemon needs

    run(load, print_banner)


def print_banner(info: "DaemonInfo") -> None:
    """Print what a newcomer needs to know, on stdout."""
    scheme = "https" if info.is_tls else "http"
    tcp = [one for one in info.addresses if not one.startswith("unix:")]
    urls = [f"{scheme}://{one}" if one in tcp else one for one in info.addresses]
    local = f"{scheme}://{Address(tcp[0]).local_address}" if tcp else urls[0]
    used, limit = format_bytes(info.used), format_bytes(info.max_size)
    upstreams = [f"{name} = {url}" for name, url in info.upstreams.items()]
    lines = (
        f"pullcache {__version__}",
        f"  listening  {', '.join(urls)}",
        f"  store      {info.store} ({used} used of at most {limit})",
        f"  upstreams  {', '.join(upstreams)}",
        f"  metrics    {local}/metrics",
        f'  docker     put {{"registry-mirrors": ["{local}"]}} into /etc/docker/daemon.json',
        "             and run: systemctl reload docker",
    )
    click.echo("\n".join(lines))
