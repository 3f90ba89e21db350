"""`pullcache refresh`: ask upstream now what tags mean."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from proxy.cli.display.text import Truncator, echo, escape_unprintable
from proxy.cli.exit_codes import FAILED, PARTIAL_SUCCESS
from proxy.cli.fleet import call_fleet, fleet_option, show_answers
from proxy.cli.options import (
    complete_images,
    config_options,
    json_option,
    no_trunc_option,
    open_client,
)


@click.command()
@config_options
@click.argument("images", metavar="[IMAGE]...", nargs=-1, shell_complete=complete_images)
@click.option("--all", "is_all", is_flag=True, help="Refresh all tags in the store.")
@fleet_option
@no_trunc_option
@json_option
def refresh(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    is_all: bool,
    is_fleet: bool,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Ask upstream now what tags mean.

    A cached tag is otherwise asked about when its TTL has passed. IMAGE may be a glob over the
    stored images. Fetches manifests, and no layers. Exits 4 if some tags were not
    found or could not be asked about, 1 if all.

    \b
    Examples:
      pullcache refresh nginx:1.27
      pullcache refresh 'ghcr.io/owner/*'
      pullcache refresh --all
      pullcache refresh nginx:1.27 --fleet
    """
    if bool(images) == is_all:
        raise click.UsageError("pass images, or --all")
    if is_fleet:
        document = {"images": images, "all": is_all}
        answers = call_fleet(path, store, "POST", "/api/v1/images/refresh", document)
        show_answers(answers, _count_outcomes, as_json=as_json)
        return
    counts: Counter[str] = Counter()
    truncator, events = Truncator(no_trunc=no_trunc), []
    with open_client(path, store) as api:
        document = {"images": images, "all": is_all}
        for event in api.stream("POST", "/api/v1/images/refresh", document):
            counts[event["outcome"]] += 1
            events.append(event)
            if not as_json:
                echo(_format_event(event, truncator))
    if as_json:
        click.echo(json.dumps(events, indent=2))
    if failed := counts["failed"] + counts["not_found"]:
        raise click.exceptions.Exit(PARTIAL_SUCCESS if failed < counts.total() else FAILED)


def _count_outcomes(events: list[dict[str, Any]]) -> str:
    counts = Counter(event["outcome"].replace("_", " ") for event in events)
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no tags"


def _format_event(event: dict[str, Any], truncator: Truncator) -> str:
    name, digest = escape_unprintable(event["image"]), truncator.digest(event["digest"])
    reason = escape_unprintable(event["reason"])
    return {
        "unchanged": f"{name}: unchanged",
        "moved": f"{name}: moved to {digest}, was {truncator.digest(event['previous'])}",
        "new": f"{name}: new, {digest}",
        "gone": f"{name}: gone: {reason}",
        "not_found": f"{name}: not found upstream: {reason}",
        "failed": f"{name}: failed: {reason}",
    }[event["outcome"]]
