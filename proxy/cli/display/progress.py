"""Progress of a transfer or a check on stderr: a bar on a terminal, occasional lines elsewhere."""

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
    """Yield `advance(count)`, to be called with each number of bytes transferred."""
    if not sys.stderr.isatty():
        yield _byte_lines(label, total)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, used on a terminal only
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


def _byte_lines(label: str, total: int | None) -> Callable[[int], None]:
    """Print a line every `REPORT_INTERVAL` seconds."""
    started = reported = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, reported
        done += count
        now = time.monotonic()
        if now - reported < REPORT_INTERVAL:
            return
        reported = now
        rate = done / (now - started)
        line = f"{label}: {format_bytes(done)}, {format_bytes(int(rate))}/s"
        if total:
            left = format_duration(max(0, total - done) / rate)
            line = f"{line}, {done / total:.0%} of {format_bytes(total)}, {left} left"
        click.echo(line, err=True)

    return advance


@contextmanager
def count_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield `update(done, total)`, to be called with the number of items done."""
    if not sys.stderr.isatty():
        yield _count_lines(label)
        return
    from rich.console import Console  # noqa: PLC0415 - slow to import, used on a terminal only
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _count_lines(label: str) -> Callable[[int, int], None]:
    """Print a line for every tenth."""
    tenths = 0

    def update(done: int, total: int) -> None:
        nonlocal tenths
        reached = done * 10 // total if total else 10
        if reached > tenths:
            tenths = reached
            click.echo(f"{label}: {tenths * 10} %", err=True)

    return update
