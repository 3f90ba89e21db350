"""`pullcache status`: how the daemon is, on one screen."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import escape_unprintable, format_bytes, format_duration, print_table
from proxy.cli.errors import FAILED
from proxy.cli.options import config_options, load_config
from proxy.config import Config
from proxy.errors import ProxyError

# A daemon that says nothing for so long is not healthy, in seconds.
PROBE_TIMEOUT = 5.0

# The share of the limit from which on pins leave nothing worth having to other images.
PINNED_WARNING_RATIO = 0.9


@click.command()
@config_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--probe", is_flag=True, help="Say by the exit code alone whether the daemon serves.")
def status(*, path: Path | None, store: str | None, as_json: bool, probe: bool) -> None:
    """Show how the daemon on the store is, and what it has done since its start.

    Without a daemon it shows the store. With --probe nothing is printed; exit code 0 means that a daemon
    runs and can serve, 1 that not.
    """
    config = load_config(path, store)
    if probe:
        raise click.exceptions.Exit(0 if _is_ready(config) else FAILED)
    with open_admin_client(config) as api:
        document = api.get("/api/v1/status")
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo("\n".join(_status_lines(document)) + "\n")
    print_table(
        ("UPSTREAM", "STATE", ">PULLS LEFT", "URL"),
        [
            (one["name"], one["problem"] or "up", _format_pulls(one), one["url"])
            for one in document["upstreams"]
        ],
    )


def _is_ready(config: Config) -> bool:
    try:
        with open_admin_client(config, allow_embedded=False, timeout=PROBE_TIMEOUT) as api:
            return api.is_ready()
    except (ProxyError, OSError):
        return False


def _status_lines(document: dict[str, Any]) -> Iterator[str]:
    store, addresses = document["store"], document["addresses"]
    state = document["state"] if addresses else "no daemon runs on this store"
    used, limit = format_bytes(store["used"]), format_bytes(store["limit"])
    yield f"state      {state}"
    yield f"version    {document['version']}"
    if addresses:
        yield f"uptime     {format_duration(document['uptime'])}"
        yield f"listening  {', '.join(addresses)}"
    if document["admin_addresses"]:
        yield f"admin      {', '.join(document['admin_addresses'])}"
    yield f"store      {escape_unprintable(store['path'])}"
    yield f"used       {used} of at most {limit} in {store['blobs']} blobs"
    if store["reserved"]:
        yield f"reserved   {format_bytes(store['reserved'])} for downloads"
    if store["pinned"]:
        is_full = store["pinned"] > PINNED_WARNING_RATIO * store["limit"]
        rest = ": no room is left for the rest, which is passed through" if is_full else ""
        yield f"pinned     {format_bytes(store['pinned'])}{rest}"
    if store["problem"]:
        yield f"problem    {escape_unprintable(store['problem'])}"
    if addresses:
        yield f"downloads  {document['downloads']} running"
        yield from _traffic_lines(document)


def _traffic_lines(document: dict[str, Any]) -> Iterator[str]:
    for state, one in document["served"].items():
        yield f"{state:<11}{one['requests']} requests, {format_bytes(one['bytes'])}"
    if document["hit_ratio"] is not None:
        saved = format_bytes(document["saved_bytes"])
        yield f"hit ratio  {document['hit_ratio']:.1%}, {saved} saved"


def _format_pulls(upstream: dict[str, Any]) -> str:
    if upstream["ratelimit_limit"] is None:
        return "-"
    return f"{upstream['ratelimit_remaining']} of {upstream['ratelimit_limit']}"


@click.command()
@config_options
@click.argument("switch", type=click.Choice(("on", "off")))
def offline(*, path: Path | None, store: str | None, switch: str) -> None:
    """Keep the running daemon from asking any upstream, or let it again.

    It holds at once, for what is under way too, and until the daemon ends: a start takes `offline` of the configuration.
    """
    # A private daemon would forget it with the end of this command.
    with open_admin_client(load_config(path, store), allow_embedded=False) as api:
        api.put("/api/v1/offline", {"offline": switch == "on"})
    click.echo(f"offline is {switch}")
