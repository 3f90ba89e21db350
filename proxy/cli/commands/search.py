"""`pullcache search`: what could be pulled, by words."""

import json
from pathlib import Path

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import Truncator, escape_unprintable, print_table
from proxy.cli.options import config_options, load_config, no_trunc_option

# How much of a description a line on a terminal has room for, as in docker's table.
_DESCRIPTION_WIDTH = 45
# Where results come from if upstream did not just find them.
_SOURCE_LABELS = {"upstream": "what it found before", "store": "what is cached here"}


@click.command()
@config_options
@click.argument("text")
@click.option(
    "--limit", type=click.IntRange(1, 100), default=25, show_default=True, help="Results at most."
)
@no_trunc_option
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def search(
    *, path: Path | None, store: str | None, text: str, limit: int, no_trunc: bool, as_json: bool
) -> None:
    """Search Docker Hub for images, or another registry: ghcr.io/TEXT.

    If it fails, or the cache is offline, an older answer is shown, or what is cached. An empty TEXT lists what is cached.
    """
    with open_admin_client(load_config(path, store)) as api:
        found = api.get("/api/v1/search", text=text, limit=limit)
    if found["problem"]:
        instead = _SOURCE_LABELS[found["source"]]
        reason = escape_unprintable(found["problem"])
        click.echo(f"{found['upstream']} was not searched, this is {instead}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    cut = Truncator(no_trunc=no_trunc)
    print_table(
        ("NAME", "DESCRIPTION", ">STARS", "OFFICIAL"),
        [
            (
                one["name"],
                cut.text(one["description"], _DESCRIPTION_WIDTH),
                str(one["stars"]),
                "[OK]" if one["is_official"] else "",
            )
            for one in found["results"]
        ],
    )
