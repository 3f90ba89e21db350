"""`pullcache check-offline`: what could be pulled with the network unplugged, and what not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import AdminClient, open_admin_client
from proxy.cli.display.text import format_bytes, print_table, short_digest
from proxy.cli.errors import FAILED
from proxy.cli.image_lists import collect_images, list_options
from proxy.cli.options import config_options, load_config

# So many a request: a request holds 4 MiB.
_IMAGES_PER_REQUEST = 1000
# So many missing parts are named in a table; --json has them all.
_MAX_MISSING_SHOWN = 3


@click.command("check-offline")
@config_options
@list_options
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON documents.")
def check_offline(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    files: tuple[Any, ...],
    platforms: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell of each image what the store has: all, a part and what is missing, or nothing.

    The exit code is 1 unless everything is complete. Tags are taken as the store knows them, however old.
    """
    wanted, problems = collect_images(images, files, platforms)
    with open_admin_client(load_config(path, store)) as api:
        checks = list(_check_images(api, wanted))
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    else:
        _print_checks(checks)
    if problems or any(check["state"] != "complete" for check in checks):
        raise click.exceptions.Exit(FAILED)


def _check_images(api: AdminClient, images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(images), _IMAGES_PER_REQUEST):
        document = {"images": images[start : start + _IMAGES_PER_REQUEST]}
        yield from api.stream("POST", "/api/v1/images/check", document)


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print_table(
        ("IMAGE", "PLATFORM", "STATUS", "MISSING"),
        [
            (check["image"], check["platform"] or "-", check["state"], _format_missing(check))
            for check in checks
        ],
    )
    bad = sum(check["state"] != "complete" for check in checks)
    lacking = sum(part["size"] for check in checks for part in check["missing"])
    verdict = (
        f"{bad} of {len(checks)} could not be pulled offline"
        if bad
        else "all could be pulled offline"
    )
    known = f"; {format_bytes(lacking)} are known to be missing" if lacking else ""
    click.echo(f"{verdict}{known}", err=True)


def _format_missing(check: dict[str, Any]) -> str:
    parts = check["missing"]
    named = [
        f"{short_digest(part['digest'])} ({format_bytes(part['size'])})"
        for part in parts[:_MAX_MISSING_SHOWN]
    ]
    more = [f"{len(parts) - _MAX_MISSING_SHOWN} more"] if len(parts) > _MAX_MISSING_SHOWN else []
    return ", ".join([*named, *more]) or check["reason"]
