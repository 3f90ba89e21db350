"""`pullcache df`: what takes the space of the store, and what goes next."""

import json
import time
from pathlib import Path
from typing import Any

import click

from proxy.cli.display.text import echo, format_bytes, format_duration, print_table
from proxy.cli.options import config_options, json_option, open_client

_COLUMNS = (">SIZE", ">UNIQUE", ">PINNED", ">RECLAIMABLE")


@click.command()
@config_options
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    metavar="N",
    default=20,
    show_default=True,
    help="Maximum number of repositories; 0 for all.",
)
@json_option
def df(*, path: Path | None, store: str | None, limit: int, as_json: bool) -> None:
    """Show what takes the space, and what goes next.

    By upstream and repository: the size of the content, how much of it no other one has (UNIQUE),
    is pinned, and would be freed by removing it (RECLAIMABLE). When the next content is evicted
    follows from how much was stored in the last day.

    \b
    Examples:
      pullcache df
      pullcache df --limit 0
    """
    with open_client(path, store) as api:
        usage = api.get("/api/v1/usage")
    if limit:
        shown = usage["repositories"][:limit]
        hidden, usage["repositories"] = len(usage["repositories"]) - len(shown), shown
    else:
        hidden = 0
    if as_json:
        click.echo(json.dumps(usage, indent=2))
        return
    for title, rows in (("UPSTREAM", usage["upstreams"]), ("REPOSITORY", usage["repositories"])):
        print_table((title, *_COLUMNS), map(_format_row, rows), optional=(">PINNED", ">UNIQUE"))
        click.echo()
    if usage["shares"]:
        print_table(
            ("RULE", ">USED", ">SHARE", "IMAGES"),
            [
                (
                    f"rules[{one['rule']}]",
                    format_bytes(one["used"]),
                    format_bytes(one["limit"]),
                    ", ".join(one["images"]),
                )
                for one in usage["shares"]
            ],
            flexible="IMAGES",
        )
        click.echo()
    if hidden:
        echo(f"{hidden} more repositories; --limit 0 shows all")
    _print_forecast(usage)


def _format_row(row: dict[str, Any]) -> tuple[str, ...]:
    keys = ("size", "unique", "pinned", "reclaimable")
    return (row["name"], *(format_bytes(row[key]) for key in keys))


def _print_forecast(usage: dict[str, Any]) -> None:
    used, limit, free = (format_bytes(usage[key]) for key in ("used", "limit", "free"))
    stored = usage["stored_last_day"]
    text = f"{used} of {limit} used, {free} free; {format_bytes(stored)} stored in the last day"
    if stored:
        text += f"; full in about {format_duration(usage['free'] * 86_400 / stored)}"
    echo(text)
    if usage["next"]:
        click.echo()
        now = time.time()
        print_table(
            ("GOES NEXT", ">SIZE", "UNUSED FOR", "IN ABOUT"),
            [
                (
                    one["repository"] or "-",
                    format_bytes(one["size"]),
                    format_duration(max(0.0, now - one["last_used"])),
                    "-" if one["at"] is None else format_duration(max(0.0, one["at"] - now)),
                )
                for one in usage["next"]
            ],
            optional=("UNUSED FOR",),
        )
