"""A preload as people see it: bars on a terminal, lines elsewhere, and its events for programs."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.display.preload_meter import WORDS, Layer, Meter
from proxy.cli.display.text import format_bytes, format_count, printable

if TYPE_CHECKING:
    from rich.text import Text

# Seconds between two lines that say how far it is.
INTERVAL = 10.0
# Characters of a bar; with less than the least it says nothing.
_BAR, _LEAST = 30, 8

Show = Callable[[dict[str, Any]], None]


@contextmanager
def opened_view(*, as_json: bool) -> Iterator[Show]:
    """Yield what is told of each event."""
    if as_json:
        yield lambda event: click.echo(json.dumps(event))
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def _outcome(event: dict[str, Any]) -> str:
    """Say in a line what became of an image."""
    name = printable(event["image"])
    if event["event"] == "failed":
        return f"{name}: failed: {printable(event['reason'])}"
    size, fetched = format_bytes(event["size"]), format_bytes(event["fetched"])
    return {
        "fetched": f"{name}: Pull complete, {fetched} of {size} fetched",
        "up_to_date": f"{name}: Image is up to date",
        "would_fetch": f"{name}: would be fetched, {size}",
    }[event["outcome"]]


def _plan(event: dict[str, Any]) -> list[str]:
    size, missing = format_bytes(event["size"]), format_bytes(event["missing"])
    lines = [f"{format_count(event['images'], 'image')} of {size}, {missing} to be fetched"]
    if event["lacking"]:
        lacking = format_bytes(event["lacking"])
        lines.append(f"the store has no room for {lacking} of it: what does not fit is left out")
    return lines


def _totals(event: dict[str, Any]) -> str:
    parts = [
        format_count(event["images"], "image"),
        f"{event['fetched_images']} fetched ({format_bytes(event['fetched'])})",
        f"{event['up_to_date']} up to date",
        f"{event['failed']} failed",
    ]
    return ", ".join(parts)


def _remarks(event: dict[str, Any]) -> list[str]:
    """Return what is said besides the images, on stderr."""
    if event["event"] == "plan":
        return _plan(event)
    return [_totals(event)] if event["event"] == "totals" else []


def _lines() -> Show:
    """Show a line an image on stdout, and on stderr from time to time how far it is."""
    meter, told = Meter(), time.monotonic()

    def show(event: dict[str, Any]) -> None:
        nonlocal told
        meter.note(event)
        if event["event"] in ("done", "failed"):
            click.echo(_outcome(event))
        elif event["event"] == "waiting":
            text = meter.waiting[event["upstream"]]
            click.echo(f"{event['upstream']}: {printable(text)}", err=True)
        for remark in _remarks(event):
            click.echo(remark, err=True)
        if time.monotonic() - told >= INTERVAL:
            told = time.monotonic()
            click.echo(meter.summary(), err=True)

    return show


@contextmanager
def _bars() -> Iterator[Show]:
    """Show a bar for each layer that is being fetched, and one for all; above them what is done."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only for people
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console, meter = Console(stderr=True, highlight=False), Meter()

    def render() -> "Text":
        lines = _render(meter, console.width, console.height - 2)
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    with Live(
        console=console,
        get_renderable=render,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=False,
    ):

        def show(event: dict[str, Any]) -> None:
            meter.note(event)
            if event["event"] in ("done", "failed"):
                if sys.stdout.isatty():
                    console.print(Text(_outcome(event)))
                else:
                    click.echo(_outcome(event))
            for remark in _remarks(event):
                console.print(Text(remark))

        yield show


def _render(meter: Meter, width: int, height: int) -> list[str]:
    """Return what is going on, in so many lines; what moves comes before what waits, and that before the rest."""
    bar = min(_BAR, width - 65)
    bar = bar if bar >= _LEAST else 0
    digests = dict.fromkeys(digest for layers in meter.images.values() for digest in layers)
    rows = [(digest, meter.layers[digest]) for digest in digests]
    moving = [row for row in rows if row[1].state in ("downloading", "verifying")]
    pending = [row for row in rows if row[1].state == "pending"]
    over = [row for row in rows if row[1].is_over]
    chosen = {digest for digest, _ in [*moving, *pending, *over][: max(1, height - 3)]}
    lines = [_row(digest, layer, bar) for digest, layer in rows if digest in chosen]
    lines += [f"{name}: {printable(text)}" for name, text in meter.waiting.items()]
    if meter.resolving:
        lines.append(f"{meter.resolving} images are looked up")
    total = f"{_bar(meter.share, bar)} " if bar else ""
    return [*lines, f"{total}{meter.summary()}"]


def _row(digest: str, layer: Layer, bar: int) -> str:
    name, word = digest.partition(":")[2][:12], WORDS[layer.state]
    if layer.state not in ("downloading", "verifying"):
        return f"{name}: {word}"
    share = layer.offset / layer.size if layer.size else 1.0
    drawn = f"{_bar(share, bar)} " if bar else ""
    return f"{name}: {word:<18} {drawn}{format_bytes(layer.offset)}/{format_bytes(layer.size)}"


def _bar(share: float, width: int) -> str:
    """Return a bar as docker draws it."""
    full = round(min(1.0, share) * width)
    head = ">" if full < width else ""
    return f"[{('=' * full + head).ljust(width)}]"
