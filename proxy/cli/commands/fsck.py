"""`pullcache fsck`: compare every stored blob with its digest, and rebuild the index."""

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli.api_client import has_store, store_not_found_message
from proxy.cli.display.progress import count_progress
from proxy.cli.display.text import escape_unprintable, format_bytes, format_count
from proxy.cli.exit_codes import CORRUPTION_FOUND
from proxy.cli.options import config_options, json_option, load_config
from proxy.errors import StoreNotFoundError

if TYPE_CHECKING:
    from proxy.storage.fsck import FsckReport


@click.command()
@config_options
@click.option("--dry-run", is_flag=True, help="Report corruption without changing anything.")
@json_option
def fsck(*, path: Path | None, store: str | None, dry_run: bool, as_json: bool) -> None:
    """Verify all blobs and rebuild the index.

    The daemon must be stopped. Reports and removes blobs that do not match their digest; exits 3
    if there are any.

    \b
    Examples:
      pullcache fsck --dry-run
    """
    config = load_config(path, store)
    if not has_store(config.store.path):
        raise StoreNotFoundError(store_not_found_message(config.store.path))
    # Imported late, because --help needs neither SQLite nor structlog.
    from proxy.log import configure_logging  # noqa: PLC0415
    from proxy.storage.fsck import check_store  # noqa: PLC0415

    with (
        closing(configure_logging(config.log.level, config.log.format)),
        count_progress("verifying") as progress,
    ):
        report = check_store(
            config.store.path,
            dry_run=dry_run,
            on_progress=progress,
            group_access=config.store.group_access,
        )
    click.echo(_format_json(report, dry_run) if as_json else _format_text(report, dry_run))
    if report.corrupt:
        raise click.exceptions.Exit(CORRUPTION_FOUND)


def _format_json(report: "FsckReport", dry_run: bool) -> str:
    corrupt = [{"path": file.path, "reason": file.reason} for file in report.corrupt]
    counts = {"checked": report.checked, "bytes": report.bytes_read, "indexed": report.indexed}
    return json.dumps(counts | {"corrupt": corrupt, "removed": not dry_run}, indent=2)


def _format_text(report: "FsckReport", dry_run: bool) -> str:
    lines = [
        f"{escape_unprintable(file.path)}: {escape_unprintable(file.reason)}"
        for file in report.corrupt
    ]
    outcome = "no corruption found"
    if report.corrupt:
        outcome = f"{len(report.corrupt)} corrupt, {'not removed' if dry_run else 'removed'}"
    verified = f"{format_count(report.checked, 'blob')} ({format_bytes(report.bytes_read)})"
    return "\n".join([*lines, f"{verified} verified, {report.indexed} indexed: {outcome}"])
