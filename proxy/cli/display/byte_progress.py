"""How far a transfer is: a bar on a terminal, a line from time to time elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from proxy.cli.display.text import format_bytes, format_duration

# Seconds between two lines.
REPORT_INTERVAL = 10.0


@contextmanager
def byte_progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yield what is told of each count of bytes that was moved; it shows them on stderr."""
    if not sys.stderr.isatty():
        yield _line_progress(label, total)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only for people
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _line_progress(label: str, total: int | None) -> Callable[[int], None]:
    began = told = time.monotonic()
    done = 0

    def show(count: int) -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told < REPORT_INTERVAL:
            return
        told = now
        rate = done / (now - began)
        line = f"{label}: {format_bytes(done)}, {format_bytes(int(rate))}/s"
        if total:
            left = format_duration(max(0, total - done) / rate)
            line = f"{line}, {done / total:.0%} of {format_bytes(total)}, {left} left"
        click.echo(line, err=True)

    return show
