"""`pullcache images`, `inspect`, `rm`, `pin` and `unpin`: list and manage the stored images."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.commands.contents import list_images_with, platform_option, print_contents
from proxy.cli.display.text import (
    Truncator,
    echo,
    escape_unprintable,
    format_bytes,
    format_count,
    format_duration,
    print_fields,
    print_table,
)
from proxy.cli.display.trust import format_policy, format_trust
from proxy.cli.fleet import (
    call_fleet,
    fleet_option,
    show_answers,
    show_images,
    skip_absent,
)
from proxy.cli.options import (
    complete_images,
    config_options,
    json_option,
    no_trunc_option,
    open_client,
)

# Width of a layer's command, and of an image name that shares a layer, on a terminal.
_COMMAND_WIDTH = 60
_NAME_WIDTH = 30

_SORT_FIELDS = {"size": "size", "unique": "unique", "last-pull": "pulled", "last-use": "used"}


@click.command()
@config_options
@click.argument("pattern", metavar="[FILTER]", default="")
@click.option(
    "--sort",
    type=click.Choice(("name", *_SORT_FIELDS)),
    metavar="KEY",
    default="name",
    help="name, size, unique, last-pull or last-use; all but name in descending order. [default: name]",
)
@click.option("--never-pulled", is_flag=True, help="Only images that no client has pulled.")
@click.option(
    "--package", metavar="QUESTION", help="Only images with a package, such as 'openssl<3.0.15'."
)
@click.option(
    "--scan", is_flag=True, help="With --package: first read the images that were not read."
)
@fleet_option
@no_trunc_option
@json_option
def images(
    *,
    path: Path | None,
    store: str | None,
    pattern: str,
    sort: str,
    never_pulled: bool,
    package: str | None,
    scan: bool,
    is_fleet: bool,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """List the images in the store.

    FILTER is a part of the name, or a glob for all of it. SIZE counts the stored bytes of an image,
    UNIQUE those that rm would free. PULLED is the last pull of a client.

    \b
    Examples:
      pullcache images
      pullcache images --never-pulled
      pullcache images 'ghcr.io/*' --sort size
      pullcache images --package 'openssl<3.0.15'
      pullcache images --fleet
    """
    if package is not None:
        if never_pulled or sort != "name":
            raise click.UsageError("--package is used alone, or with --scan")
        list_images_with(
            path, store, package, pattern, reads=scan, no_trunc=no_trunc, as_json=as_json
        )
        return
    if scan:
        raise click.UsageError("--scan is for --package")
    if is_fleet:
        answers = call_fleet(path, store, "GET", "/api/v1/images", filter=pattern)
        show_images(answers, as_json=as_json)
        return
    with open_client(path, store) as api:
        found = list(api.stream("GET", "/api/v1/images", filter=pattern))
    if never_pulled:
        found = [image for image in found if image["pulled"] is None]
    if sort != "name":
        found.sort(key=lambda image: -(image[_SORT_FIELDS[sort]] or 0))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    now, truncator = time.time(), Truncator(no_trunc=no_trunc)
    print_table(
        ("IMAGE", "PLATFORMS", ">SIZE", ">UNIQUE", ">CACHED", ">PULLED", "TRUST", "STATUS"),
        [
            (
                _format_name(image, truncator),
                _format_platforms(image["platforms"], truncator),
                format_bytes(image["size"]),
                format_bytes(image["unique"]),
                _format_age(now, image["cached"]),
                _format_age(now, image["pulled"]),
                format_trust(image["trust"]),
                _format_status(image),
            )
            for image in found
        ],
        optional=("TRUST", ">CACHED", "PLATFORMS", ">UNIQUE"),
        no_trunc=no_trunc,
    )


@click.command()
@config_options
@click.argument("image", shell_complete=complete_images)
@click.option("--packages", is_flag=True, help="Show the packages in the image.")
@platform_option
@no_trunc_option
@json_option
def inspect(
    *,
    path: Path | None,
    store: str | None,
    image: str,
    packages: bool,
    platform: str,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Show the details of a stored image.

    For each platform: its layers, the commands that created them, and its configuration. Referrers
    are signatures, SBOMs and the like.

    \b
    Examples:
      pullcache inspect nginx:1.27
      pullcache inspect nginx:1.27 --packages
    """
    if platform and not packages:
        raise click.UsageError("--platform is for --packages")
    if packages:
        with open_client(path, store) as api:
            found = api.get("/api/v1/images/contents", image=image, platform=platform)
        print_contents(found, as_json=as_json, no_trunc=no_trunc)
        return
    with open_client(path, store) as api:
        document = api.get("/api/v1/images/inspect", image=image)
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    truncator = Truncator(no_trunc=no_trunc)
    print_fields(_overview_fields(document, truncator))
    absent = []
    for one in document["platforms"]:
        if one["state"]["state"] == "absent":
            absent.append(one["state"]["platform"] or "?")
        else:
            click.echo()
            _print_platform(one, truncator)
    if absent:
        click.echo()
        print_fields([("absent", ", ".join(absent))])
    if document["referrers"]:
        click.echo()
        _print_referrers(document, truncator)


@click.command()
@config_options
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images
)
@click.option("--dry-run", is_flag=True, help="Print what would be freed; remove nothing.")
@click.option("--force", is_flag=True, help="Also remove pinned images.")
@fleet_option
@json_option
def rm(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    dry_run: bool,
    force: bool,
    is_fleet: bool,
    as_json: bool,
) -> None:
    """Remove images from the store.

    IMAGE may be a glob, as 'ghcr.io/owner/*'. Removes their blobs too, except those that other
    images use. If an image is not stored, or is pinned, nothing is removed. Clients may pull the images again.

    \b
    Examples:
      pullcache rm nginx:1.27 --dry-run
      pullcache rm nginx:1.27 'ghcr.io/owner/*'
    """
    request = {"images": images, "dry_run": dry_run, "force": force}
    if is_fleet:
        answers = call_fleet(path, store, "POST", "/api/v1/images/remove", request)
        show_answers(skip_absent(answers), _describe_removed, as_json=as_json)
        return
    with open_client(path, store) as api:
        removed = api.post("/api/v1/images/remove", request)
    if as_json:
        click.echo(json.dumps(removed, indent=2))
        return
    for name in removed["images"]:
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}")
    freed = f"{format_bytes(removed['bytes'])} in {format_count(removed['blobs'], 'blob')}"
    click.echo(f"{'would free' if dry_run else 'freed'} {freed}")


def _describe_removed(removed: dict[str, Any] | None) -> str:
    if removed is None:
        return "does not have it"
    freed = f"{format_bytes(removed['bytes'])} in {format_count(removed['blobs'], 'blob')}"
    return f"{format_count(len(removed['images']), 'image')}, {freed}"


@click.command()
@config_options
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images
)
@fleet_option
def pin(*, path: Path | None, store: str | None, images: tuple[str, ...], is_fleet: bool) -> None:
    """Protect images from eviction.

    If a pinned tag moves, the new image is protected. An image that is not stored yet is protected
    once it is downloaded.

    \b
    Examples:
      pullcache pin nginx:1.27
    """
    if is_fleet:
        answers = call_fleet(path, store, "POST", "/api/v1/images/pin", {"images": images})
        show_answers(answers, lambda pinned: f"pinned {', '.join(pinned['images'])}")
        return
    with open_client(path, store) as api:
        pinned = api.post("/api/v1/images/pin", {"images": images})
    for name in pinned["images"]:
        later = "; it is not stored yet" if name in pinned["absent"] else ""
        echo(f"pinned {name}{later}")


@click.command()
@config_options
@click.argument(
    "images", metavar="IMAGE...", nargs=-1, required=True, shell_complete=complete_images
)
@fleet_option
def unpin(*, path: Path | None, store: str | None, images: tuple[str, ...], is_fleet: bool) -> None:
    """Allow images to be evicted again.

    \b
    Examples:
      pullcache unpin nginx:1.27
    """
    if is_fleet:
        answers = call_fleet(path, store, "POST", "/api/v1/images/unpin", {"images": images})
        show_answers(
            answers, lambda found: f"unpinned {format_count(len(found['images']), 'image')}"
        )
        return
    with open_client(path, store) as api:
        unpinned = api.post("/api/v1/images/unpin", {"images": images})["images"]
    for name in unpinned:
        click.echo(f"unpinned {name}")
    requested = len(set(images))
    if len(unpinned) < requested:
        click.echo(f"{requested - len(unpinned)} of {requested} were not pinned", err=True)


def _format_name(image: dict[str, Any], truncator: Truncator) -> str:
    """Return the name in the form that commands accept; a truncated digest is for display only."""
    separator = "@" if ":" in image["reference"] else ":"
    return f"{image['repository']}{separator}{truncator.digest(image['reference'])}"


def _format_platforms(platforms: list[dict[str, Any]], truncator: Truncator) -> str:
    parts = [
        f"{truncator.platform(one['platform']) or '-'}"
        f"{' (partial)' if one['state'] == 'partial' else ''}"
        for one in platforms
        if one["state"] != "absent"
    ]
    if absent := len(platforms) - len(parts):
        parts.append(f"{absent} absent")
    return ", ".join(parts) or "-"


def _format_status(image: dict[str, Any]) -> str:
    state: str = image["state"]
    if state == "partial":
        missing = [
            blob["size"]
            for platform in image["platforms"]
            if platform["state"] == "partial"
            for blob in platform["missing"]
        ]
        state = f"partial, {format_bytes(sum(missing))} missing" if missing else "partial"
    if image["pinned"]:
        state += ", pinned"
    return ", ".join(filter(None, (state, format_policy(image["policy"]))))


def _format_age(now: float, timestamp: float | None) -> str:
    """Return the age in its largest unit, because a column of them is easier to compare."""
    if timestamp is None:
        return "-"
    return " ".join(format_duration(max(0, now - timestamp)).split()[:2])


def _overview_fields(document: dict[str, Any], truncator: Truncator) -> Iterator[tuple[str, str]]:
    now, cached = time.time(), document["cached"]
    yield "name", document["name"]
    yield "digest", truncator.digest(document["digest"])
    yield "type", document["media_type"]
    yield "also named", ", ".join(name for name in document["names"] if name != document["name"])
    size, unique = format_bytes(document["size"]), format_bytes(document["unique"])
    yield "size", f"{size}, rm would free {unique}"
    yield "cached", "" if cached is None else f"{_format_age(now, cached)} ago"
    pulled = document["pulled"]
    yield "last pull", "never" if pulled is None else f"{_format_age(now, pulled)} ago"
    yield "last use", f"{_format_age(now, document['used'])} ago"
    yield "pinned", "yes" if document["pinned"] else ""
    yield "trust", _describe_trust(document["trust"], now)
    yield "policy", _describe_policy(document["policy"])
    yield "history", "\n".join(_describe_history(document["history"], truncator))


def _describe_trust(trust: dict[str, Any], now: float) -> str:
    label = format_trust(trust)
    if trust["asked"]:
        label += f" ({trust['source']}, {_format_age(now, trust['asked'])} ago)"
    return "" if label == "-" else label


def _describe_policy(policy: dict[str, Any] | None) -> str:
    if policy is None:
        return ""
    reason = f": {policy['reason']}" if policy["reason"] else ""
    if policy["until"]:
        ends = " until" if policy["decision"] == "allow" else "; from"
        reason += f"{ends} {_format_time(policy['until'])}"
    verdict = format_policy(policy) or f"allowed by policy {policy['policy']}"
    return f"{verdict}{reason}"


def _describe_history(history: list[dict[str, Any]], truncator: Truncator) -> Iterator[str]:
    """Yield a line for each digest that the tag meant, unless it always meant the same."""
    for one in history if len(history) > 1 else ():
        first, last = (_format_time(one[key]) for key in ("first_seen", "last_seen"))
        source = f" ({escape_unprintable(one['source'])})" if one["source"] else ""
        yield f"{truncator.digest(one['digest'])} {first} to {last}{source}"


def _format_time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(at))


def _print_platform(platform: dict[str, Any], truncator: Truncator) -> None:
    state, config = platform["state"], platform["config"] or {}
    keys = ("user", "workdir", "entrypoint", "cmd", "ports", "env", "labels", "created")
    size = format_bytes(state["size"])
    print_fields(
        [
            ("platform", f"{state['platform'] or '-'} ({state['state']}, {size})"),
            ("digest", truncator.digest(state["digest"])),
            *((key, _format_value(config.get(key))) for key in keys),
        ]
    )
    if platform["layers"]:
        print_table(
            ("LAYER", ">SIZE", "CACHED", "SHARED WITH", "CREATED BY"),
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
            optional=("SHARED WITH", "CACHED"),
            flexible="CREATED BY",
            no_trunc=truncator.no_trunc,
        )


def _print_referrers(document: dict[str, Any], truncator: Truncator) -> None:
    platforms = {
        platform["state"]["digest"]: platform["state"]["platform"]
        for platform in document["platforms"]
    }
    print_table(
        ("REFERRER", "TYPE", ">SIZE", "OF"),
        [
            (
                truncator.digest(referrer["digest"]),
                referrer["artifact_type"] or "-",
                format_bytes(referrer["size"]),
                # Referrers that belong to no platform belong to the index.
                platforms.get(referrer["subject"]) or "image",
            )
            for referrer in document["referrers"]
        ],
        optional=("OF",),
        no_trunc=truncator.no_trunc,
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
