"""A preload as people see it: bars on a terminal, lines elsewhere, and its events for programs."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.display.preload_tracker import STATE_LABELS, ProgressTracker, TrackedLayer
from proxy.cli.display.text import escape_unprintable, format_bytes, format_count

if TYPE_CHECKING:
    from rich.text import Text

# Seconds between two lines that say how far it is.
REPORT_INTERVAL = 10.0
# Characters of a bar; with less than the least it says nothing.
_BAR_WIDTH, _MIN_BAR_WIDTH = 30, 8

EventHandler = Callable[[dict[str, Any]], None]


@contextmanager
def open_view(*, as_json: bool) -> Iterator[EventHandler]:
    """Yield what is told of each event."""
    if as_json:
        yield lambda event: click.echo(json.dumps(event))
    elif sys.stderr.isatty():
        with _bar_view() as show:
            yield show
    else:
        yield _line_view()


def _format_outcome(event: dict[str, Any]) -> str:
    """Say in a line what became of an image."""
    name = escape_unprintable(event["image"])
    if event["event"] == "failed":
        return f"{name}: failed: {escape_unprintable(event['reason'])}"
    size, fetched = format_bytes(event["size"]), format_bytes(event["fetched"])
    return {
        "fetched": f"{name}: Pull complete, {fetched} of {size} fetched",
        "up_to_date": f"{name}: Image is up to date",
        "would_fetch": f"{name}: would be fetched, {size}",
    }[event["outcome"]]


def _format_plan(event: dict[str, Any]) -> list[str]:
    size, missing = format_bytes(event["size"]), format_bytes(event["missing"])
    lines = [f"{format_count(event['images'], 'image')} of {size}, {missing} to be fetched"]
    if event["shortfall"]:
        shortfall = format_bytes(event["shortfall"])
        lines.append(f"the store has no room for {shortfall} of it: what does not fit is left out")
    return lines


def _format_totals(event: dict[str, Any]) -> str:
    parts = [
        format_count(event["images"], "image"),
        f"{event['fetched_images']} fetched ({format_bytes(event['fetched'])})",
        f"{event['up_to_date']} up to date",
        f"{event['failed']} failed",
    ]
    return ", ".join(parts)


def _summary_lines(event: dict[str, Any]) -> list[str]:
    """Return what is said besides the images, on stderr."""
    if event["event"] == "plan":
        return _format_plan(event)
    return [_format_totals(event)] if event["event"] == "totals" else []


def _line_view() -> EventHandler:
    """Show a line an image on stdout, and on stderr from time to time how far it is."""
    meter, told = ProgressTracker(), time.monotonic()

    def show(event: dict[str, Any]) -> None:
        nonlocal told
        meter.record(event)
        if event["event"] in ("done", "failed"):
            click.echo(_format_outcome(event))
        elif event["event"] == "waiting":
            text = meter.waiting[event["upstream"]]
            click.echo(f"{event['upstream']}: {escape_unprintable(text)}", err=True)
        for remark in _summary_lines(event):
            click.echo(remark, err=True)
        if time.monotonic() - told >= REPORT_INTERVAL:
            told = time.monotonic()
            click.echo(meter.summary(), err=True)

    return show


@contextmanager
def _bar_view() -> Iterator[EventHandler]:
    """Show a bar for each layer that is being fetched, and one for all; above them what is done."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only for people
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console, meter = Console(stderr=True, highlight=False), ProgressTracker()

    def render() -> "Text":
        lines = _render_lines(meter, console.width, console.height - 2)
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    with Live(
        console=console,
        get_renderable=render,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=False,
    ):

        def show(event: dict[str, Any]) -> None:
            meter.record(event)
            if event["event"] in ("done", "failed"):
                if sys.stdout.isatty():
                    console.print(Text(_format_outcome(event)))
                else:
                    click.echo(_format_outcome(event))
            for remark in _summary_lines(event):
                console.print(Text(remark))

        yield show


def _render_lines(tracker: ProgressTracker, width: int, height: int) -> list[str]:
    """Return what is going on, in so many lines; what moves comes before what waits, and that before the rest."""
    bar = min(_BAR_WIDTH, width - 65)
    bar = bar if bar >= _MIN_BAR_WIDTH else 0
    digests = dict.fromkeys(digest for layers in tracker.images.values() for digest in layers)
    rows = [(digest, tracker.layers[digest]) for digest in digests]
    moving = [row for row in rows if row[1].state in ("downloading", "verifying")]
    pending = [row for row in rows if row[1].state == "pending"]
    over = [row for row in rows if row[1].is_finished]
    chosen = {digest for digest, _ in [*moving, *pending, *over][: max(1, height - 3)]}
    lines = [_render_layer(digest, layer, bar) for digest, layer in rows if digest in chosen]
    lines += [f"{name}: {escape_unprintable(text)}" for name, text in tracker.waiting.items()]
    if tracker.resolving:
        lines.append(f"{tracker.resolving} images are looked up")
    total = f"{_render_bar(tracker.fraction, bar)} " if bar else ""
    return [*lines, f"{total}{tracker.summary()}"]


def _render_layer(digest: str, layer: TrackedLayer, bar_width: int) -> str:
    name, word = digest.partition(":")[2][:12], STATE_LABELS[layer.state]
    if layer.state not in ("downloading", "verifying"):
        return f"{name}: {word}"
    share = layer.offset / layer.size if layer.size else 1.0
    drawn = f"{_render_bar(share, bar_width)} " if bar_width else ""
    return f"{name}: {word:<18} {drawn}{format_bytes(layer.offset)}/{format_bytes(layer.size)}"


def _render_bar(fraction: float, width: int) -> str:
    """Return a bar as docker draws it."""
    full = round(min(1.0, fraction) * width)
    head = ">" if full < width else ""
    return f"[{('=' * full + head).ljust(width)}]"
