"""`pullcache fsck`: every stored byte read and compared with its digest."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli.display.text import escape_unprintable, format_bytes
from proxy.cli.errors import CORRUPTION_FOUND
from proxy.cli.options import config_options, load_config

if TYPE_CHECKING:
    from proxy.storage.fsck import FsckReport


@click.command()
@config_options
@click.option("--dry-run", is_flag=True, help="Say what is wrong and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def fsck(*, path: Path | None, store: str | None, dry_run: bool, as_json: bool) -> None:
    """Check every blob of a stopped daemon's store, and rebuild its index.

    Names and removes what does not match its digest; the exit code is 3 if there was any.
    """
    config = load_config(path, store)
    # The store brings SQLite and the log, which --help can do without.
    from proxy.log import configure_logging  # noqa: PLC0415
    from proxy.storage.fsck import check_store  # noqa: PLC0415

    with (
        closing(configure_logging(config.log.level, config.log.format)),
        _show_progress() as progress,
    ):
        report = check_store(config.store.path, dry_run=dry_run, on_progress=progress)
    click.echo(_as_json(report, dry_run) if as_json else _as_text(report, dry_run))
    if report.corrupt:
        raise click.exceptions.Exit(CORRUPTION_FOUND)


def _as_json(report: "FsckReport", dry_run: bool) -> str:
    corrupt = [{"path": found.path, "reason": found.reason} for found in report.corrupt]
    counts = {"checked": report.checked, "bytes": report.bytes_read, "indexed": report.indexed}
    return json.dumps(counts | {"corrupt": corrupt, "removed": not dry_run}, indent=2)


def _as_text(report: "FsckReport", dry_run: bool) -> str:
    lines = [
        f"{escape_unprintable(found.path)}: {escape_unprintable(found.reason)}"
        for found in report.corrupt
    ]
    outcome = "left where they are" if dry_run else "removed"
    bad = f"{len(report.corrupt)} bad, {outcome}" if report.corrupt else "all right"
    read = f"{report.checked} blobs ({format_bytes(report.bytes_read)}) read"
    return "\n".join([*lines, f"{read}, {report.indexed} in the index: {bad}"])


@contextmanager
def _show_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how far the work is: a bar on a terminal, else a line each tenth."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only for people
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress() -> Callable[[int, int], None]:
    tenths = 0

    def show(done: int, total: int) -> None:
        nonlocal tenths
        reached = done * 10 // total if total else 10
        if reached > tenths:
            tenths = reached
            click.echo(f"read {tenths * 10} %", err=True)

    return show
