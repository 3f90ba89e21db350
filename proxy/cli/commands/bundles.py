"""`pullcache export` and `pullcache import`: images as files, for places that no network leads to."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import click

from proxy.cli.api_client import AdminClient, open_admin_client
from proxy.cli.display.byte_progress import byte_progress
from proxy.cli.display.text import escape_unprintable, format_bytes, format_count
from proxy.cli.errors import FAILED, PARTIAL_SUCCESS
from proxy.cli.files import bundle_files
from proxy.cli.files.bundle_files import BundleArgument
from proxy.cli.files.output_file import OutputFile
from proxy.cli.image_lists import read_image_list
from proxy.cli.options import config_options, load_config
from proxy.config.values import Size
from proxy.errors import DaemonUnavailableError, FileUnreachableError


class _SizeParam(click.ParamType[Size]):
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
    "--split", type=_SizeParam(), metavar="SIZE", help="Write parts of at most SIZE: FILE.000 …"
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
    listed, problems = read_image_list(list_file) if list_file else ((), 0)
    wanted = [*images, *(entry.reference for entry in listed)]
    if not wanted:
        raise click.UsageError("name the images to export, or a list of them with -f")
    if output == "-" and (split or as_json):
        raise click.UsageError("--split and --json need a file to write to: -o FILE")
    if output == "-" and sys.stdout.isatty():
        raise click.UsageError(
            "a bundle is nothing for a terminal: write it to a file with -o FILE"
        )
    known = {
        digest
        for given in bundle_files.find_bundles(since)
        for digest in bundle_files.read_digests(given)
    }
    document = {"images": wanted, "platforms": platforms, "exclude": sorted(known)}
    with open_admin_client(load_config(path, store)) as api:
        plan = api.post("/api/v1/export/plan", document)
        with (
            byte_progress("exporting", plan["size"]) as advance,
            OutputFile(output, split) as target,
        ):
            _write_bundle(api, document, target, advance)
    if as_json:
        click.echo(
            json.dumps(
                plan | {"files": target.file_names, "written": target.bytes_written}, indent=2
            )
        )
    else:
        _print_summary(plan, target)
    if problems:
        raise click.exceptions.Exit(PARTIAL_SUCCESS)


def _write_bundle(
    api: AdminClient,
    document: dict[str, Any],
    output_file: OutputFile,
    advance: Callable[[int], None],
) -> None:
    """Have the daemon write the bundle if it can open the file, or send it."""
    if output_file.plain_path:
        file = {"file": bundle_files.describe_file(output_file.plain_path)}
        with suppress(FileUnreachableError):
            for event in api.stream("POST", "/api/v1/export/file", document | file):
                advance(event["done"] - output_file.bytes_written)
                output_file.bytes_written = event["done"]
            return
    api.post_to_file("/api/v1/export", document, cast("Any", _CountingWriter(output_file, advance)))


def _print_summary(plan: dict[str, Any], output_file: OutputFile) -> None:
    for image in plan["images"]:
        if image["skipped_platforms"]:
            missing = ", ".join(image["skipped_platforms"])
            click.echo(
                f"{escape_unprintable(image['name'])}: without {escape_unprintable(missing)}, not stored",
                err=True,
            )
    into = f" in {len(output_file.file_names)} parts" if len(output_file.file_names) > 1 else ""
    size = format_bytes(output_file.bytes_written)
    images, blobs = format_count(len(plan["images"]), "image"), format_count(plan["blobs"], "blob")
    click.echo(f"{images}, {blobs}, {size}{into}", err=True)


class _CountingWriter:
    """A target that tells of each write."""

    def __init__(self, output_file: OutputFile, advance: Callable[[int], None]) -> None:
        self._output_file = output_file
        self._advance = advance

    def write(self, data: bytes) -> int:
        count = self._output_file.write(data)
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
    with open_admin_client(load_config(path, store)) as api:
        for given in bundle_files.find_bundles(names):
            reports.append(_import_bundle(api, given, name))
            if not as_json:
                _print_report(given, reports[-1])
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    images = [image for report in reports for image in report["images"]]
    good = [image for image in images if not image["missing"] and not image["reason"]]
    if len(good) < len(images):
        raise click.exceptions.Exit(PARTIAL_SUCCESS if good else FAILED)


def _import_bundle(api: AdminClient, bundle: BundleArgument, name: str | None) -> dict[str, Any]:
    with byte_progress(f"importing {escape_unprintable(bundle.name)}", bundle.size) as advance:
        done = 0
        for event in _import_events(api, bundle, name):
            if "done" in event:
                advance(event["done"] - done)
                done = event["done"]
            else:
                return {"bundle": bundle.name} | event
    raise DaemonUnavailableError("the daemon ended before it was done; run the command again")


def _import_events(
    api: AdminClient, bundle: BundleArgument, name: str | None
) -> Iterator[dict[str, Any]]:
    """Have the daemon read the bundle if it can open the files, or send it."""
    if files := bundle.describe_files():
        document = {"files": files, "name": name or ""}
        with suppress(FileUnreachableError):
            yield from api.stream("POST", "/api/v1/import/files", document)
            return
    yield from api.stream("POST", "/api/v1/import", upload=bundle.iter_chunks(), name=name)


def _print_report(bundle: BundleArgument, report: dict[str, Any]) -> None:
    for image in report["images"]:
        outcome = "complete"
        if image["missing"]:
            lacking = format_count(len(image["missing"]), "blob")
            outcome = f"not taken, it lacks {lacking}; import the bundle that has:"
        outcome = escape_unprintable(image["reason"]) or outcome
        click.echo(f"{escape_unprintable(image['name'] or image['digest'])}: {outcome}")
        for digest in image["missing"]:
            click.echo(f"  {digest}")
    size = format_bytes(report["added_bytes"])
    added = f"{format_count(report['added'], 'blob')} ({size}) added"
    click.echo(
        f"{escape_unprintable(bundle.name)}: {added}, {report['already_stored']} were here",
        err=True,
    )
