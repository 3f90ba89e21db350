"""`pullcache check-offline`: what could be pulled with the network unplugged, and what not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import AdminApi, admin_api
from proxy.cli.display.text import format_bytes, print_table, short_digest
from proxy.cli.errors import FAILED
from proxy.cli.image_lists import list_options, wanted_images
from proxy.cli.options import config_options, load_config

# So many a request: a request holds 4 MiB.
_CHUNK = 1000
# So many missing parts are named in a table; --json has them all.
_NAMED = 3


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
    wanted, problems = wanted_images(images, files, platforms)
    with admin_api(load_config(path, store)) as api:
        checks = list(_checked(api, wanted))
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    else:
        _print(checks)
    if problems or any(check["state"] != "complete" for check in checks):
        raise click.exceptions.Exit(FAILED)


def _checked(api: AdminApi, wanted: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(wanted), _CHUNK):
        document = {"images": wanted[start : start + _CHUNK]}
        yield from api.stream("POST", "/api/v1/images/check", document)


def _print(checks: list[dict[str, Any]]) -> None:
    print_table(
        ("IMAGE", "PLATFORM", "STATUS", "MISSING"),
        [
            (check["image"], check["platform"] or "-", check["state"], _missing(check))
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


def _missing(check: dict[str, Any]) -> str:
    parts = check["missing"]
    named = [
        f"{short_digest(part['digest'])} ({format_bytes(part['size'])})" for part in parts[:_NAMED]
    ]
    more = [f"{len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return ", ".join([*named, *more]) or check["reason"]
