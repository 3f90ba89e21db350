"""`pullcache check-offline`: whether images can be pulled offline, and which blobs are missing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import AdminClient
from proxy.cli.display.text import echo, format_bytes, print_table, short_digest
from proxy.cli.display.trust import format_policy
from proxy.cli.exit_codes import FAILED
from proxy.cli.fleet import call_fleet, fleet_option, merge_checks, warn_of_failures
from proxy.cli.image_lists import collect_images, list_options
from proxy.cli.options import config_options, json_option, open_client

# Images in one request, whose document may have 4 MiB.
_IMAGES_PER_REQUEST = 1000
# The same for the fleet, whose calls are in the head of a request.
_IMAGES_PER_CALL = 50
# Missing blobs named in a table cell; --json has all of them.
_MAX_MISSING_SHOWN = 3


@click.command("check-offline")
@config_options
@list_options
@fleet_option
@json_option
def check_offline(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    files: tuple[Any, ...],
    platforms: tuple[str, ...],
    is_fleet: bool,
    as_json: bool,
) -> None:
    """Check if images can be pulled offline.

    Lists the missing blobs of incomplete images. Uses the cached tags, regardless of their age.
    Exits 1 unless every image is complete. With --fleet, what any node has is not missing.

    \b
    Examples:
      pullcache check-offline nginx:1.27
      pullcache check-offline -f compose.yaml
      pullcache check-offline -f compose.yaml --fleet
    """
    requested, invalid = collect_images(images, files, platforms)
    failed = False
    if is_fleet:
        checks: list[dict[str, Any]] = []
        for start in range(0, len(requested), _IMAGES_PER_CALL):
            document = {"images": requested[start : start + _IMAGES_PER_CALL]}
            answers = call_fleet(path, store, "POST", "/api/v1/images/check", document)
            checks += merge_checks(answers)
            failed = failed or warn_of_failures(answers)
    else:
        with open_client(path, store) as api:
            checks = list(_check_images(api, requested))
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    else:
        _print_checks(checks)
    if invalid or failed or any(check["state"] != "complete" for check in checks):
        raise click.exceptions.Exit(FAILED)


def _check_images(api: AdminClient, images: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(images), _IMAGES_PER_REQUEST):
        document = {"images": images[start : start + _IMAGES_PER_REQUEST]}
        yield from api.stream("POST", "/api/v1/images/check", document)


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print_table(
        ("IMAGE", "PLATFORM", "STATUS", "MISSING"),
        [
            (check["image"], check["platform"] or "-", _format_state(check), _format_missing(check))
            for check in checks
        ],
    )
    incomplete = sum(check["state"] != "complete" for check in checks)
    missing = sum(blob["size"] for check in checks for blob in check["missing"])
    verdict = (
        f"{incomplete} of {len(checks)} cannot be pulled offline"
        if incomplete
        else "all can be pulled offline"
    )
    known = f"; at least {format_bytes(missing)} missing" if missing else ""
    refused = sum(bool(check["policy"] and not check["policy"]["is_allowed"]) for check in checks)
    policies = f"; policies refuse {refused}: see pullcache policy why" if refused else ""
    echo(f"{verdict}{known}{policies}", err=True)


def _format_state(check: dict[str, Any]) -> str:
    return ", ".join(filter(None, (check["state"], format_policy(check["policy"]))))


def _format_missing(check: dict[str, Any]) -> str:
    blobs = check["missing"]
    named = [
        f"{short_digest(blob['digest'])} ({format_bytes(blob['size'])})"
        for blob in blobs[:_MAX_MISSING_SHOWN]
    ]
    more = [f"{len(blobs) - _MAX_MISSING_SHOWN} more"] if len(blobs) > _MAX_MISSING_SHOWN else []
    return ", ".join([*named, *more]) or check["reason"]
