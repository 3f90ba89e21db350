"""`pullcache export` and `pullcache import`: move images between stores as files."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import click

from proxy.cli.api_client import AdminClient
from proxy.cli.display.progress import byte_progress
from proxy.cli.display.text import echo, escape_unprintable, format_bytes, format_count
from proxy.cli.display.trust import format_policy
from proxy.cli.exit_codes import FAILED, PARTIAL_SUCCESS
from proxy.cli.files import bundle_input
from proxy.cli.files.bundle_input import BundleInput
from proxy.cli.files.bundle_output import BundleOutput
from proxy.cli.image_lists import read_image_list
from proxy.cli.options import complete_images, config_options, json_option, open_client
from proxy.config.values import Size
from proxy.errors import DaemonUnavailableError, FileUnreachableError


class _SizeParam(click.ParamType[Size]):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Size:
        """Return the number of bytes in "4GB"."""
        try:
            size = Size.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail("must be larger than 0", param, ctx)
        return size


@click.command()
@config_options
@click.argument("images", metavar="[IMAGE]...", nargs=-1, shell_complete=complete_images)
@click.option(
    "-f",
    "--file",
    "list_file",
    metavar="FILE",
    type=click.File(),
    help="Image list in any format of preload -f.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    help="Bundle file; compressed if it ends in .zst; - for stdout.",
)
@click.option(
    "--platform",
    "platforms",
    metavar="OS/ARCH",
    multiple=True,
    help="Platform to export. May be repeated.",
)
@click.option(
    "--split",
    type=_SizeParam(),
    metavar="SIZE",
    help="Split into FILE.000, FILE.001 … of at most SIZE each.",
)
@click.option(
    "--since",
    multiple=True,
    metavar="BUNDLE",
    help="Leave out blobs of an earlier bundle. May be repeated.",
)
@click.option(
    "--facts",
    is_flag=True,
    help="Add what is known about the images, so that policies of another cache can judge them "
    "offline.",
)
@json_option
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
    facts: bool,
    as_json: bool,
) -> None:
    """Export stored images to a bundle.

    A bundle is a tar of an OCI image layout. pullcache import, docker load, podman load, ctr images
    import and skopeo read it. For multi-platform images, only complete platforms are exported,
    unless --platform selects some. Exits 4 if the image list has invalid entries.

    \b
    Examples:
      pullcache export nginx:1.27 -o images.tar.zst
      pullcache export -f images.txt -o b.tar --split 4GB
    """
    entries, invalid = read_image_list(list_file) if list_file else ((), 0)
    requested = [*images, *(entry.reference for entry in entries)]
    if not requested:
        raise click.UsageError("pass images to export, or an image list with -f")
    if output == "-" and (split or as_json):
        raise click.UsageError("--split and --json require -o FILE")
    if output == "-" and sys.stdout.isatty():
        raise click.UsageError("refusing to write a bundle to a terminal; use -o FILE")
    excluded = {
        digest
        for bundle in bundle_input.find_bundles(since)
        for digest in bundle_input.read_digests(bundle)
    }
    document = {
        "images": requested,
        "platforms": platforms,
        "exclude": sorted(excluded),
        "facts": facts,
    }
    with open_client(path, store) as api:
        plan = api.post("/api/v1/export/plan", document)
        with (
            byte_progress("exporting", plan["size"]) as advance,
            BundleOutput(output, split) as bundle_output,
        ):
            _write_bundle(api, document, bundle_output, advance)
    if as_json:
        written = {"files": bundle_output.file_names, "written": bundle_output.bytes_written}
        click.echo(json.dumps(plan | written, indent=2))
    else:
        _print_summary(plan, bundle_output)
    if invalid:
        raise click.exceptions.Exit(PARTIAL_SUCCESS)


def _write_bundle(
    api: AdminClient,
    document: dict[str, Any],
    output: BundleOutput,
    advance: Callable[[int], None],
) -> None:
    """Let the daemon write the file if it can open it; else write the response to the file."""
    if output.plain_path:
        file = {"file": bundle_input.describe_file(output.plain_path)}
        with suppress(FileUnreachableError):
            for event in api.stream("POST", "/api/v1/export/file", document | file):
                advance(event["done"] - output.bytes_written)
                output.bytes_written = event["done"]
            return
    api.post_to_file("/api/v1/export", document, cast("Any", _CountingWriter(output, advance)))


class _CountingWriter:
    """Writes to the output and reports the bytes as progress."""

    def __init__(self, output: BundleOutput, advance: Callable[[int], None]) -> None:
        self._output = output
        self._advance = advance

    def write(self, data: bytes) -> int:
        count = self._output.write(data)
        self._advance(count)
        return count


def _print_summary(plan: dict[str, Any], output: BundleOutput) -> None:
    for image in plan["images"]:
        if image["skipped_platforms"]:
            skipped = escape_unprintable(", ".join(image["skipped_platforms"]))
            name = escape_unprintable(image["name"])
            echo(f"{name}: skipped {skipped} (incomplete)", err=True)
        if policy := format_policy(image["policy"]):
            reason = escape_unprintable(image["policy"]["reason"])
            echo(f"{escape_unprintable(image['name'])}: {policy}: {reason}", err=True)
    images, blobs = format_count(len(plan["images"]), "image"), format_count(plan["blobs"], "blob")
    size, parts = format_bytes(output.bytes_written), len(output.file_names)
    click.echo(f"{images}, {blobs}, {size}{f' in {parts} parts' if parts > 1 else ''}", err=True)


@click.command("import")
@config_options
@click.argument("names", metavar="BUNDLE...", nargs=-1, required=True)
@click.option("--name", help="Image or repository name, for bundles that do not contain names.")
@json_option
def import_(
    *, path: Path | None, store: str | None, names: tuple[str, ...], name: str | None, as_json: bool
) -> None:
    """Import images from bundles.

    BUNDLE is an OCI image layout as a tar, compressed or not, as pullcache export, skopeo, docker
    save (25 and later) and hauler write it; its parts; a directory; or - for stdin. Every digest is
    verified. Exits 4 if some images are incomplete, 1 if all are.

    \b
    Examples:
      pullcache import images.tar.zst
    """
    reports = []
    with open_client(path, store, creates_store=True) as api:
        for bundle in bundle_input.find_bundles(names):
            reports.append(_import_bundle(api, bundle, name))
            if not as_json:
                _print_report(bundle, reports[-1])
    if as_json:
        click.echo(json.dumps(reports, indent=2))
    images = [image for report in reports for image in report["images"]]
    complete = [image for image in images if not image["missing"] and not image["reason"]]
    if len(complete) < len(images):
        raise click.exceptions.Exit(PARTIAL_SUCCESS if complete else FAILED)


def _import_bundle(api: AdminClient, bundle: BundleInput, name: str | None) -> dict[str, Any]:
    with byte_progress(f"importing {escape_unprintable(bundle.name)}", bundle.size) as advance:
        done = 0
        for event in _import_events(api, bundle, name):
            if "done" in event:
                advance(event["done"] - done)
                done = event["done"]
            else:
                return {"bundle": bundle.name} | event
    raise DaemonUnavailableError("the daemon stopped during the import; run the command again")


def _import_events(
    api: AdminClient, bundle: BundleInput, name: str | None
) -> Iterator[dict[str, Any]]:
    """Let the daemon read the files if it can open them; else upload the bundle."""
    if files := bundle.describe_files():
        document = {"files": files, "name": name or ""}
        with suppress(FileUnreachableError):
            yield from api.stream("POST", "/api/v1/import/files", document)
            return
    yield from api.stream("POST", "/api/v1/import", upload=bundle.iter_chunks(), name=name)


def _print_report(bundle: BundleInput, report: dict[str, Any]) -> None:
    for image in report["images"]:
        outcome = "complete"
        if image["missing"]:
            missing = format_count(len(image["missing"]), "blob")
            outcome = f"not imported, {missing} missing; first import a bundle that contains:"
        outcome = escape_unprintable(image["reason"]) or outcome
        click.echo(f"{escape_unprintable(image['name'] or image['digest'])}: {outcome}")
        for digest in image["missing"]:
            click.echo(f"  {digest}")
    size = format_bytes(report["added_bytes"])
    added = f"{format_count(report['added'], 'blob')} ({size}) added"
    name = escape_unprintable(bundle.name)
    facts = ""
    if report["facts"] is not None:
        count = report["facts"]
        facts = f", facts about {count} {'repository' if count == 1 else 'repositories'}"
    click.echo(f"{name}: {added}, {report['already_stored']} already stored{facts}", err=True)
