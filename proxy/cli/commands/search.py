"""`pullcache search`: find images at upstream, or in the store if upstream cannot be searched."""

import json
from pathlib import Path

import click

from proxy.cli.display.text import Truncator, echo, escape_unprintable, print_table
from proxy.cli.display.trust import format_trust
from proxy.cli.options import config_options, json_option, no_trunc_option, open_client

# Width of a description on a terminal, as in the table of `docker search`.
_DESCRIPTION_WIDTH = 45
# Where the results are from if upstream was not searched.
_SOURCE_LABELS = {"upstream": "earlier results", "store": "cached images"}


@click.command()
@config_options
@click.argument("text")
@click.option(
    "--limit",
    type=click.IntRange(1, 100),
    metavar="N",
    default=25,
    show_default=True,
    help="Maximum number of results.",
)
@click.option("--official", is_flag=True, help="Only Docker Official Images.")
@click.option(
    "--trusted", is_flag=True, help="Only official images and those of verified publishers."
)
@no_trunc_option
@json_option
def search(
    *,
    path: Path | None,
    store: str | None,
    text: str,
    limit: int,
    official: bool,
    trusted: bool,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Search Docker Hub or another registry.

    ghcr.io/TEXT searches ghcr.io. If upstream fails or the cache is offline, shows earlier results
    or cached images. An empty TEXT lists the cached images.

    \b
    Examples:
      pullcache search nginx --official
      pullcache search quay.io/prometheus
    """
    with open_client(path, store) as api:
        trust = "official" if official else "trusted" if trusted else None
        answer = api.get("/api/v1/search", text=text, limit=limit, trust=trust)
    if answer["problem"]:
        reason = escape_unprintable(answer["problem"])
        shown = _SOURCE_LABELS[answer["source"]]
        echo(f"{answer['upstream']} was not searched ({reason}); showing {shown}", err=True)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    truncator = Truncator(no_trunc=no_trunc)
    print_table(
        ("NAME", "DESCRIPTION", ">STARS", "TRUST"),
        [
            (
                hit["name"],
                truncator.text(hit["description"], _DESCRIPTION_WIDTH),
                str(hit["stars"]),
                format_trust(hit),
            )
            for hit in answer["results"]
        ],
        optional=(">STARS",),
        flexible="DESCRIPTION",
        no_trunc=no_trunc,
    )
