"""`pullcache check-offline`: what could be pulled with the network unplugged, and what not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api import AdminApi, admin_api
from proxy.cli.errors import FAILED
from proxy.cli.options import config_options, load_config
from proxy.cli.output import format_bytes, print_table, short_digest

# So many a request: a request holds 4 MiB.
_CHUNK = 1000
# So many missing parts are named in a table; --json has them all.
_NAMED = 3


@click.command("check-offline")
@config_options
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.File(encoding="utf-8", errors="replace"),
    help="A list of images: plain, compose, Kubernetes, skopeo, regsync, hauler; - is stdin.",
)
@click.option(
    "--platform",
    "platforms",
    multiple=True,
    metavar="OS/ARCH",
    help="May be repeated; \"all\" is every platform of an image. [default: the list's, or this machine's]",
)
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
    wanted = [{"image": image, "platforms": platforms} for image in images]
    problems = 0
    for file in files:
        listed, wrong = _read(file, platforms)
        wanted += listed
        problems += wrong
    if not wanted and not problems:
        raise click.UsageError("name images, or a list of them with -f")
    with admin_api(load_config(path, store)) as api:
        checks = list(_checked(api, wanted))
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    else:
        _print(checks)
    if problems or any(check["state"] != "complete" for check in checks):
        raise click.exceptions.Exit(FAILED)


def _read(file: Any, platforms: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """Return the images of a list, and how many of its lines say nothing that can be checked."""
    from proxy.cache.lists import MAX_TEXT, parse_list  # noqa: PLC0415 - brings YAML

    found = parse_list(file.read(MAX_TEXT + 1))
    name = getattr(file, "name", "-")
    for problem in found.problems:
        click.echo(f"{name}:{problem.line}: {problem.message}", err=True)
    wrong = sum(problem.kind == "error" for problem in found.problems)
    return [
        {"image": entry.reference, "platforms": platforms or entry.platforms}
        for entry in found.entries
    ], wrong


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
