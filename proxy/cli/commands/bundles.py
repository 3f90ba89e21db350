"""`pullcache export` and `pullcache import`: images as files, for places that no network leads to."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import click

from proxy.cli.api_client import AdminApi, admin_api
from proxy.cli.display.text import format_bytes, format_count, printable
from proxy.cli.display.transfer_progress import transfer_progress
from proxy.cli.errors import FAILED, PARTLY_DONE
from proxy.cli.files import bundles as bundle_files
from proxy.cli.files.bundles import Given
from proxy.cli.files.output_file import Target
from proxy.cli.image_lists import read_list
from proxy.cli.options import config_options, load_config
from proxy.config.values import Size
from proxy.errors import DaemonError, FileUnreachableError


class _Size(click.ParamType[Size]):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Size:
        """Return the bytes that "4GB" means."""
        try:
            size = Size.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail("a part has at least one byte", param, ctx)
        return size


@click.command()
@config_options
@click.argument("images", metavar="IMAGE...", nargs=-1)
@click.option(
    "-f",
    "--file",
    "list_file",
    type=click.File(),
    help="A list of images, in any format that is common.",
)
@click.option(
    "-o", "--output", required=True, help='The bundle; compressed if it ends in .zst; "-": stdout.'
)
@click.option("--platform", "platforms", multiple=True, help="os/arch[/variant]; may be repeated.")
@click.option(
    "--split", type=_Size(), metavar="SIZE", help="Write parts of at most SIZE: FILE.000 …"
)
@click.option(
    "--since", multiple=True, metavar="BUNDLE", help="Leave out what it has; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    list_file: IO[str] | None,
    output: str,
    platforms: tuple[str, ...],
    split: Size | None,
    since: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write images of the store into one tar: an OCI image layout that docker load takes too.

    pullcache import, docker load, podman load, ctr images import and skopeo read it. Of images for many platforms
    those go out that are wholly in the store, or those that --platform names.
    """
    listed, problems = read_list(list_file) if list_file else ((), 0)
    wanted = [*images, *(entry.reference for entry in listed)]
    if not wanted:
        raise click.UsageError("name the images to export, or a list of them with -f")
    if output == "-" and (split or as_json):
        raise click.UsageError("--split and --json need a file to write to: -o FILE")
    if output == "-" and sys.stdout.isatty():
        raise click.UsageError(
            "a bundle is nothing for a terminal: write it to a file with -o FILE"
        )
    known = {digest for given in bundle_files.find(since) for digest in bundle_files.digests(given)}
    document = {"images": wanted, "platforms": platforms, "without": sorted(known)}
    with admin_api(load_config(path, store)) as api:
        plan = api.post("/api/v1/export/plan", document)
        with (
            transfer_progress("exporting", plan["size"]) as advance,
            Target(output, split) as target,
        ):
            _write(api, document, target, advance)
    if as_json:
        click.echo(json.dumps(plan | {"files": target.names, "written": target.written}, indent=2))
    else:
        _tell(plan, target)
    if problems:
        raise click.exceptions.Exit(PARTLY_DONE)


def _write(
    api: AdminApi, document: dict[str, Any], target: Target, advance: Callable[[int], None]
) -> None:
    """Have the daemon write the bundle if it can open the file, or send it."""
    if target.plain:
        file = {"file": bundle_files.describe(target.plain)}
        with suppress(FileUnreachableError):
            for event in api.stream("POST", "/api/v1/export/file", document | file):
                advance(event["done"] - target.written)
                target.written = event["done"]
            return
    api.download("/api/v1/export", document, cast("Any", _Counted(target, advance)))


def _tell(plan: dict[str, Any], target: Target) -> None:
    for image in plan["images"]:
        if image["left_out"]:
            missing = ", ".join(image["left_out"])
            click.echo(
                f"{printable(image['name'])}: without {printable(missing)}, not stored", err=True
            )
    into = f" in {len(target.names)} parts" if len(target.names) > 1 else ""
    size = format_bytes(target.written)
    images, blobs = format_count(len(plan["images"]), "image"), format_count(plan["blobs"], "blob")
    click.echo(f"{images}, {blobs}, {size}{into}", err=True)


class _Counted:
    """A target that tells of each write."""

    def __init__(self, target: Target, advance: Callable[[int], None]) -> None:
        self._target = target
        self._advance = advance

    def write(self, data: bytes) -> int:
        count = self._target.write(data)
        self._advance(count)
        return count


@click.command("import")
@config_options
@click.argument("names", metavar="FILE|DIR|-...", nargs=-1, required=True)
@click.option("--name", help="The repository, or image, of a bundle that does not say it.")
@click.option("--json", "as_json", is_flag=True, help="Print what became of the images as JSON.")
def import_(
    *, path: Path | None, store: str | None, names: tuple[str, ...], name: str | None, as_json: bool
) -> None:
    """Take the images of bundles into the store, so that they can be pulled from it without any network.

    A bundle is a tar of an OCI image layout, compressed or not, as pullcache export, skopeo, docker save (25 and later)
    and hauler write it; its parts; or a directory. Every digest is checked. The exit code is 4 if some images are
    not complete, 1 if none is.
    """
    reports = []
    with admin_api(load_config(path, store)) as api:
        for given in bundle_files.find(names):
            reports.append(_take(api, given, name))
            if not as_json:
                _show(given, reports[-1])
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    images = [image for report in reports for image in report["images"]]
    good = [image for image in images if not image["missing"] and not image["reason"]]
    if len(good) < len(images):
        raise click.exceptions.Exit(PARTLY_DONE if good else FAILED)


def _take(api: AdminApi, given: Given, name: str | None) -> dict[str, Any]:
    with transfer_progress(f"importing {printable(given.name)}", given.size) as advance:
        done = 0
        for event in _events(api, given, name):
            if "done" in event:
                advance(event["done"] - done)
                done = event["done"]
            else:
                return {"bundle": given.name} | event
    raise DaemonError("the daemon ended before it was done; run the command again")


def _events(api: AdminApi, given: Given, name: str | None) -> Iterator[dict[str, Any]]:
    """Have the daemon read the bundle if it can open the files, or send it."""
    if files := given.described():
        document = {"files": files, "name": name or ""}
        with suppress(FileUnreachableError):
            yield from api.stream("POST", "/api/v1/import/files", document)
            return
    yield from api.stream("POST", "/api/v1/import", upload=given.pieces(), name=name)


def _show(given: Given, report: dict[str, Any]) -> None:
    for image in report["images"]:
        outcome = "complete"
        if image["missing"]:
            lacking = format_count(len(image["missing"]), "blob")
            outcome = f"not taken, it lacks {lacking}; import the bundle that has:"
        outcome = printable(image["reason"]) or outcome
        click.echo(f"{printable(image['name'] or image['digest'])}: {outcome}")
        for digest in image["missing"]:
            click.echo(f"  {digest}")
    size = format_bytes(report["added_bytes"])
    added = f"{format_count(report['added'], 'blob')} ({size}) added"
    click.echo(f"{printable(given.name)}: {added}, {report['known']} were here", err=True)
