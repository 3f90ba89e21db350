"""`pullcache events`: who changed what is served or kept, and what was evicted."""

import json
import pwd
import re
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from proxy.cli.display.text import Truncator, format_bytes, print_table
from proxy.cli.options import (
    DurationParameter,
    config_options,
    json_option,
    no_trunc_option,
    open_client,
)
from proxy.config import Duration

# The actions that `--action` takes; a test compares them with those that the daemon records.
ACTIONS = (
    "remove",
    "pin",
    "unpin",
    "offline",
    "online",
    "preload",
    "import",
    "export",
    "reload",
    "refresh",
    "scan",
    "exception",
    "evict",
)
# Width of the last column, and of the images, on a terminal.
_DETAIL_WIDTH = 40
_IMAGES_WIDTH = 30
# Seconds for which a time is shown without its year.
_RECENT = 300 * 86_400.0


@click.command()
@config_options
@click.option(
    "--image", default="", metavar="IMAGE", help="Only what is about this image or repository."
)
@click.option(
    "--action",
    type=click.Choice(ACTIONS),
    metavar="ACTION",
    help=f"Only this action: {', '.join(ACTIONS)}.",
)
@click.option(
    "--since",
    type=DurationParameter(),
    metavar="TIME",
    default="30d",
    show_default=True,
    help="How far to go back.",
)
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(1, 1000),
    metavar="N",
    default=100,
    show_default=True,
    help="Number of events.",
)
@no_trunc_option
@json_option
def events(
    *,
    path: Path | None,
    store: str | None,
    image: str,
    action: str | None,
    since: Duration,
    limit: int,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Show who changed what the cache keeps or serves.

    Lists removed, pinned, preloaded, imported and exported images, reloads, exceptions and the offline
    switch, each with who did it, and what was evicted, the latest first.

    \b
    Examples:
      pullcache events --image nginx:1.27
    """
    with open_client(path, store) as api:
        found = api.get(
            "/api/v1/events",
            image=image,
            action=action or "",
            since=time.time() - since,
            limit=limit,
        )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"no events in the last {since}", err=True)
        return
    truncator = Truncator(no_trunc=no_trunc)
    is_short, now = truncator.is_active, time.time()
    print_table(
        ("TIME", "ACTION", "BY", "IMAGES", "OUTCOME"),
        [
            (
                _format_time(one["at"], now, is_short=is_short),
                _format_action(one),
                _format_actor(one["actor"], is_short=is_short),
                truncator.text(_format_images(one["images"], truncator), _IMAGES_WIDTH),
                truncator.text(_format_outcome(one), _DETAIL_WIDTH),
            )
            for one in found
        ],
        flexible=("IMAGES", "OUTCOME"),
        no_trunc=no_trunc,
    )


def _format_time(at: float, now: float, *, is_short: bool) -> str:
    """Return a local time; in short as `ls` shows it, without seconds, and without the year or the hour."""
    if not is_short:
        return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    form = "%m-%d %H:%M" if 0 <= now - at < _RECENT else "%Y-%m-%d"
    return datetime.fromtimestamp(at).astimezone().strftime(form)


def _format_action(event: dict[str, Any]) -> str:
    return f"evict ({event['detail']})" if event["action"] == "evict" else event["action"]


def _format_actor(actor: str, *, is_short: bool) -> str:
    """Return an actor with the user's name, if this machine knows it; in short without the process."""
    match = re.fullmatch(r"uid (\d+) pid (\d+)", actor)
    if match is None:
        return actor
    with suppress(KeyError):
        name = pwd.getpwuid(int(match[1])).pw_name
        return name if is_short else f"{name} (pid {match[2]})"
    return f"uid {match[1]}" if is_short else actor


def _format_images(images: dict[str, int], truncator: Truncator) -> str:
    names = []
    for name in images:
        path, at, digest = name.partition("@")
        short = path.removeprefix("docker.io/").removeprefix("library/") or "unknown"
        names.append(f"{short}{at}{truncator.digest(digest)}")
    if len(names) > 1 and truncator.is_active:
        return f"{names[0]} and {len(names) - 1} more"
    return ", ".join(names) or "-"


def _format_outcome(event: dict[str, Any]) -> str:
    if event["action"] == "evict":
        return format_bytes(sum(event["images"].values()))
    detail = re.sub(r"(\d+) bytes", lambda match: format_bytes(int(match[1])), event["detail"])
    if event["outcome"] == "done":
        return detail or "done"
    return f"{event['outcome']}: {detail}" if detail else event["outcome"]
