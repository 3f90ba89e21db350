"""`pullcache images`, `inspect`, `rm`, `pin` and `unpin`: what is in the store, as images."""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import (
    Truncator,
    escape_unprintable,
    format_bytes,
    format_count,
    format_duration,
    print_table,
)
from proxy.cli.options import config_options, load_config, no_trunc_option

# How much of a command, and of a name among others, a line on a terminal has room for.
_COMMAND_WIDTH = 60
_NAME_WIDTH = 30

_SORT_FIELDS = {"size": "size", "unique": "unique", "last-pull": "used"}


@click.command()
@config_options
@click.argument("pattern", metavar="[FILTER]", default="")
@click.option(
    "--sort", type=click.Choice(("name", *_SORT_FIELDS)), default="name", help="What comes first."
)
@no_trunc_option
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON documents.")
def images(
    *,
    path: Path | None,
    store: str | None,
    pattern: str,
    sort: str,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """List the images of the store, those whose name holds FILTER or matches it as a glob.

    SIZE is what is stored of an image, UNIQUE what rm would free. Platforms that are not wholly here are marked.
    """
    with open_admin_client(load_config(path, store)) as api:
        found = list(api.stream("GET", "/api/v1/images", filter=pattern))
    if sort != "name":
        found.sort(key=lambda image: -(image[_SORT_FIELDS[sort]] or 0))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    now, cut = time.time(), Truncator(no_trunc=no_trunc)
    print_table(
        ("IMAGE", "PLATFORMS", ">SIZE", ">UNIQUE", ">CACHED", ">PULLED", "STATUS"),
        [
            (
                _format_name(image, cut),
                _format_platforms(image["platforms"], cut),
                format_bytes(image["size"]),
                format_bytes(image["unique"]),
                _format_age(now, image["cached"]),
                _format_age(now, image["used"]),
                _format_status(image),
            )
            for image in found
        ],
    )


@click.command()
@config_options
@click.argument("image")
@no_trunc_option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(
    *, path: Path | None, store: str | None, image: str, no_trunc: bool, as_json: bool
) -> None:
    """Show an image of the store: platforms, layers and what made them, configuration, referrers."""
    with open_admin_client(load_config(path, store)) as api:
        document = api.get("/api/v1/images/inspect", image=image)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    cut = Truncator(no_trunc=no_trunc)
    _print_fields(_overview_fields(document))
    platforms = document["platforms"]
    for one in platforms:
        if one["state"]["state"] != "absent":
            click.echo()
            _print_platform(one, cut)
    absent = [
        one["state"]["platform"] or "?" for one in platforms if one["state"]["state"] == "absent"
    ]
    if absent:
        click.echo(f"\nnot in the store: {escape_unprintable(', '.join(absent))}")
    if document["referrers"]:
        click.echo()
        print_table(
            ("REFERRER", "TYPE", ">SIZE", "OF"),
            [
                (
                    cut.digest(one["digest"]),
                    one["artifact_type"] or "-",
                    format_bytes(one["size"]),
                    _format_subject(document, one["subject"]),
                )
                for one in document["referrers"]
            ],
        )


@click.command()
@config_options
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and remove nothing.")
@click.option("--force", is_flag=True, help="Remove pinned images too.")
@click.option("--json", "as_json", is_flag=True, help="Print what was freed as JSON.")
def rm(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Remove images from the store, and what no other image there has.

    Clients may pull them again. All are removed, or none: one that is not there, or pinned, is an error.
    """
    wanted = {"images": images, "dry_run": dry_run, "force": force}
    with open_admin_client(load_config(path, store)) as api:
        removed = api.post("/api/v1/images/remove", wanted)
    if as_json:
        click.echo(json.dumps(removed, indent=2))
        return
    for name in removed["images"]:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    freed = f"{format_bytes(removed['bytes'])} in {format_count(removed['blobs'], 'blob')}"
    click.echo(f"{freed} {'would be' if dry_run else 'are'} free")


@click.command()
@config_options
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
def pin(*, path: Path | None, store: str | None, images: tuple[str, ...]) -> None:
    """Keep images in the store, whatever else it is asked to hold.

    A tag that moves takes its pin along. What is not in the store yet is kept as it comes.
    """
    with open_admin_client(load_config(path, store)) as api:
        pinned = api.post("/api/v1/images/pin", {"images": images})["images"]
    click.echo("\n".join(f"pinned {name}" for name in pinned))


@click.command()
@config_options
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
def unpin(*, path: Path | None, store: str | None, images: tuple[str, ...]) -> None:
    """Let images go again when the store needs room."""
    with open_admin_client(load_config(path, store)) as api:
        freed = api.post("/api/v1/images/unpin", {"images": images})["images"]
    for name in freed:
        click.echo(f"unpinned {name}")
    if len(freed) < len(set(images)):
        others = len(set(images)) - len(freed)
        click.echo(f"{others} of {len(set(images))} were not pinned", err=True)


def _format_name(image: dict[str, Any], truncator: Truncator) -> str:
    """Return the name as the commands take it; a digest's beginning is enough to be looked at."""
    mark = "@" if ":" in image["reference"] else ":"
    return f"{image['repository']}{mark}{truncator.digest(image['reference'])}"


def _format_platforms(states: list[dict[str, Any]], truncator: Truncator) -> str:
    here = [
        f"{truncator.platform(one['platform']) or '-'}{' (partial)' if one['state'] == 'partial' else ''}"
        for one in states
        if one["state"] != "absent"
    ]
    absent = len(states) - len(here)
    more = f"+{absent}" if here else f"none of {absent}"
    return ", ".join(here) + (f" {more}" if absent else "") or "-"


def _format_status(image: dict[str, Any]) -> str:
    state: str = image["state"]
    if state == "partial":
        lacking = [
            part["size"]
            for one in image["platforms"]
            if one["state"] == "partial"
            for part in one["missing"]
        ]
        state = f"partial, {format_bytes(sum(lacking))} missing" if lacking else "partial"
    return f"{state}, pinned" if image["pinned"] else state


def _format_age(now: float, timestamp: float | None) -> str:
    # The greatest unit alone: a column to be read down.
    return (
        "-" if timestamp is None else " ".join(format_duration(max(0, now - timestamp)).split()[:2])
    )


def _overview_fields(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    now = time.time()
    size, unique = format_bytes(document["size"]), format_bytes(document["unique"])
    yield "name", document["name"]
    yield "digest", document["digest"]
    yield "type", document["media_type"]
    yield "also", ", ".join(name for name in document["names"] if name != document["name"])
    yield "size", f"{size}, of which rm frees {unique}"
    yield (
        "cached",
        f"{_format_age(now, document['cached'])} ago, last pull {_format_age(now, document['used'])} ago",
    )
    yield "pinned", "yes" if document["pinned"] else ""


def _print_platform(platform: dict[str, Any], truncator: Truncator) -> None:
    state, config = platform["state"], platform["config"] or {}
    run = ("user", "workdir", "entrypoint", "cmd", "ports", "env", "labels", "created")
    _print_fields(
        [
            (
                "platform",
                f"{state['platform'] or '-'} ({state['state']}, {format_bytes(state['size'])})",
            ),
            ("digest", state["digest"]),
            *((name, _format_value(config.get(name))) for name in run),
        ]
    )
    if platform["layers"]:
        print_table(
            ("LAYER", ">SIZE", "CACHED", "SHARED WITH", "MADE BY"),
            [
                (
                    truncator.digest(layer["digest"]),
                    format_bytes(layer["size"]),
                    "yes" if layer["cached"] else "no",
                    _format_names(layer["shared"], truncator),
                    truncator.text(layer["command"], _COMMAND_WIDTH) or "-",
                )
                for layer in platform["layers"]
            ],
        )


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}={text}" for name, text in value.items())
    if isinstance(value, list):
        is_short = sum(map(len, value)) < 60
        return (" " if is_short else "\n").join(map(str, value))
    return str(value or "")


def _format_names(names: list[str], truncator: Truncator) -> str:
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    return f"{truncator.text(names[0], _NAME_WIDTH)}{more}" if names else "-"


def _format_subject(document: dict[str, Any], subject: str) -> str:
    """Return what a referrer refers to: a platform, or the whole."""
    platforms = {one["state"]["digest"]: one["state"]["platform"] for one in document["platforms"]}
    return platforms.get(subject) or "image"


def _print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values, a value of several lines below one another; nothing for an empty one."""
    for name, value in fields:
        for number, line in enumerate(value.split("\n") if value else ()):
            click.echo(f"{'' if number else name:<11}{escape_unprintable(line)}")
