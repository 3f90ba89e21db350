"""`pullcache preload`: fetch images before clients ask for them."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import click

from proxy.cli.display.preload_progress import open_view
from proxy.cli.exit_codes import FAILED, PARTIAL_SUCCESS
from proxy.cli.fleet import call_fleet, fleet_option, show_answers
from proxy.cli.image_lists import collect_images, list_options
from proxy.cli.options import config_options, open_client
from proxy.oci.platform import parse_platform


@click.command()
@config_options
@list_options
@click.option("--all-platforms", is_flag=True, help="Same as --platform all.")
@click.option("--pin", is_flag=True, help="Pin the images, which protects them from eviction.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched; fetch manifests only.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Concurrent downloads. [default and maximum: fetch.max_downloads]",
)
@click.option(
    "--no-wait",
    is_flag=True,
    help="Fail at once while an upstream is down or limits requests.",
)
@click.option(
    "--lock",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a lock file: an image list with the digests that were fetched.",
)
@fleet_option
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON lines.")
def preload(  # noqa: C901 (its options exclude each other)
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
    no_wait: bool,
    lock: Path | None,
    is_fleet: bool,
    as_json: bool,
) -> None:
    """Fetch images before clients pull them.

    Fetches the current images from upstream, with their signatures and SBOMs. Skips stored content
    and resumes partial downloads, so it is safe to repeat. Waits two minutes for an upstream that
    is down, and a day for one that limits requests. Exits 4 if some images failed or a
    signature that exists could not be fetched, 1 if all images failed.

    \b
    Examples:
      pullcache preload nginx:1.27 redis:7
      pullcache preload -f compose.yaml --pin
      pullcache preload -f images.txt --lock images.lock
      pullcache preload -f compose.yaml --fleet
    """
    if all_platforms and platforms:
        raise click.UsageError("--all-platforms and --platform are mutually exclusive")
    _check_platforms(platforms)
    requested, failed = collect_images(images, files, ("all",) if all_platforms else platforms)
    request = {"images": requested, "pin": pin, "dry_run": dry_run, "jobs": jobs}
    request["waits"] = not no_wait
    if is_fleet:
        if lock or dry_run:
            raise click.UsageError("--lock and --dry-run are about one node: omit --fleet")
        answers = call_fleet(path, store, "POST", "/api/v1/preload", request) if requested else []
        _show_fleet(answers, failed, as_json=as_json)
        return
    resolved: dict[str, dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    with open_client(path, store, creates_store=True) as api, open_view(as_json=as_json) as show:
        for event in api.stream("POST", "/api/v1/preload", request) if requested else ():
            show(event)
            if event["event"] == "resolved":
                resolved[event["image"]] = event
            elif event["event"] == "done":
                done.append(resolved[event["image"]])
            elif event["event"] == "referrer_missing":
                missing.append(event)
            failed += event["event"] == "failed"
    if lock:
        _write_lock(lock, done, missing)
    if failed or missing:
        raise click.exceptions.Exit(PARTIAL_SUCCESS if done else FAILED)


def _show_fleet(answers: list[dict[str, Any]], failed: int, *, as_json: bool) -> None:
    """Print what each node has fetched. Exits 4 if an image failed on one of them, or was invalid."""
    show_answers(answers, _describe_events, as_json=as_json)
    events = (event for answer in answers for event in answer["document"] or ())
    if failed or any(event["event"] == "failed" for event in events):
        raise click.exceptions.Exit(PARTIAL_SUCCESS)


def _describe_events(events: list[dict[str, Any]]) -> str:
    """Return what one node of the fleet has fetched."""
    done = sum(event["event"] == "done" for event in events)
    failed = [event for event in events if event["event"] == "failed"]
    text = f"{done} complete"
    if failed:
        text += f", {len(failed)} failed: {failed[0]['image']}: {failed[0]['reason']}"
    return text


def _check_platforms(platforms: tuple[str, ...]) -> None:
    """Raise `InvalidReferenceError` if a platform is malformed."""
    for platform in platforms:
        if platform != "all":
            parse_platform(platform)


def _write_lock(path: Path, images: list[dict[str, Any]], missing: list[dict[str, Any]]) -> None:
    """Write the lock file atomically. The same images result in the same bytes."""
    entries = []
    for image in images:
        entry = {
            "image": image["name"],
            "digest": image["digest"],
            "size": image["size"],
            "platforms": image["platforms"],
        }
        if referrers := [
            {name: event[name] for name in ("subject", "reference", "reason")}
            for event in missing
            if event["image"] == image["image"]
        ]:
            entry["missing_referrers"] = referrers
        entries.append(entry)
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
