"""`pullcache preload`: images fetched before anybody asks for them."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.preload_progress import open_view
from proxy.cli.errors import FAILED, PARTIAL_SUCCESS
from proxy.cli.image_lists import collect_images, list_options
from proxy.cli.options import config_options, load_config


@click.command()
@config_options
@list_options
@click.option("--all-platforms", is_flag=True, help="Everything that an image has.")
@click.option("--pin", is_flag=True, help="Keep them in the store from then on.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched; fetches manifests only.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    help="Layers at once. [default, and at most: fetch.max_downloads]",
)
@click.option(
    "--lock",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write names, digests and sizes to FILE, which -f reads.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what happens, a line of JSON each.")
def preload(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    files: tuple[IO[str], ...],
    platforms: tuple[str, ...],
    all_platforms: bool,
    pin: bool,
    dry_run: bool,
    jobs: int | None,
    lock: Path | None,
    as_json: bool,
) -> None:
    """Fetch images into the store, as they are upstream now, with their signatures and SBOMs.

    What is here is not fetched again, and what was broken off goes on, so that the same command may be given at any time. The
    exit code is 4 if some images could not be had, 1 if none could.
    """
    if all_platforms and platforms:
        raise click.UsageError("--all-platforms and --platform are both given; keep one")
    _check_platforms(platforms)
    wanted, wrong = collect_images(images, files, ("all",) if all_platforms else platforms)
    order = {"images": wanted, "pin": pin, "dry_run": dry_run, "jobs": jobs}
    resolved: dict[str, dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    failed = wrong
    with open_admin_client(load_config(path, store)) as api, open_view(as_json=as_json) as show:
        for event in api.stream("POST", "/api/v1/preload", order) if wanted else ():
            show(event)
            if event["event"] == "resolved":
                resolved[event["image"]] = event
            elif event["event"] == "done":
                done.append(resolved[event["image"]])
            failed += event["event"] == "failed"
    if lock:
        _write_lock(lock, done)
    if failed:
        raise click.exceptions.Exit(PARTIAL_SUCCESS if done else FAILED)


def _check_platforms(platforms: tuple[str, ...]) -> None:
    """Raise `InvalidReferenceError` if one of them is none."""
    from proxy.oci.platform import parse_platform  # noqa: PLC0415 - brings msgspec

    for platform in platforms:
        if platform != "all":
            parse_platform(platform)


def _write_lock(path: Path, images: list[dict[str, Any]]) -> None:
    """Write the lock file, wholly or not at all; the same images make the same bytes."""
    entries = [
        {
            "image": image["name"],
            "digest": image["digest"],
            "size": image["size"],
            "platforms": image["platforms"],
        }
        for image in images
    ]
    document = {"pullcache-lock": 1, "images": sorted(entries, key=lambda entry: entry["image"])}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
