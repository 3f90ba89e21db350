"""`pullcache top`: the images, repositories and clients with the most pulls, or bytes."""

import json
from pathlib import Path

import click

from proxy.cli.display.text import Truncator, format_bytes, print_table
from proxy.cli.options import config_options, json_option, no_trunc_option, open_client

_SCOPES = {"images": "image", "repositories": "repository", "clients": "client"}
# Width of a name on a terminal.
_NAME_WIDTH = 28


@click.command()
@config_options
@click.argument("what", metavar="[WHAT]", type=click.Choice([*_SCOPES]), default="images")
@click.option(
    "--by",
    type=click.Choice(("pulls", "bytes")),
    metavar="KEY",
    default="pulls",
    show_default=True,
    help="Order by pulls, or by bytes sent to clients (bytes).",
)
@click.option(
    "--days",
    type=click.IntRange(1, 366),
    metavar="N",
    default=7,
    show_default=True,
    help="Days that count, today included.",
)
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1000),
    metavar="N",
    default=20,
    show_default=True,
    help="Number of lines.",
)
@no_trunc_option
@json_option
def top(
    *,
    path: Path | None,
    store: str | None,
    what: str,
    by: str,
    days: int,
    limit: int,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Show what is pulled most.

    WHAT is images (the default), repositories or clients. Images and clients are counted for the last
    31 days, repositories for a year. HITS is the share of pulls of which nothing came from upstream.

    \b
    Examples:
      pullcache top repositories --by bytes --days 30
    """
    with open_client(path, store) as api:
        found = api.get("/api/v1/traffic/top", of=_SCOPES[what], by=by, days=days, limit=limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    truncator = Truncator(no_trunc=no_trunc)
    # Of images and clients it is not known what was fetched for them.
    fetched = [">FETCHED"] if what == "repositories" else []
    print_table(
        (_SCOPES[what].upper(), ">PULLS", ">HITS", ">SENT", *fetched),
        [
            (
                truncator.text(_short_name(one["name"], truncator), _NAME_WIDTH),
                str(one["pulls"]),
                f"{one['hits'] / one['pulls']:.0%}" if one["pulls"] else "-",
                format_bytes(one["sent_bytes"]),
                *[format_bytes(one["received_bytes"] + one["preloaded_bytes"]) for _ in fetched],
            )
            for one in found
        ],
        optional=(">FETCHED",),
        no_trunc=no_trunc,
    )


def _short_name(name: str, truncator: Truncator) -> str:
    """Return the name as `docker pull` takes it, its digest short on a terminal."""
    name = name.removeprefix("docker.io/").removeprefix("library/")
    path, at, digest = name.partition("@")
    return f"{path}{at}{truncator.digest(digest)}"
