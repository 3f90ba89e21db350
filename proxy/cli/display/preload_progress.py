"""Progress of a preload, from its events: bars on a terminal, lines elsewhere, or JSON.

`ProgressTracker` adds up the events; the views below `open_view` show them. The wording follows
`docker pull`.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from proxy.cli.display.text import (
    escape_unprintable,
    format_bytes,
    format_count,
    format_duration,
    wrap,
)

if TYPE_CHECKING:
    from rich.text import Text

# Seconds between two progress lines.
REPORT_INTERVAL = 10.0
# Seconds over which the transfer rate is averaged.
_RATE_WINDOW = 10.0
# Width of a bar in characters; a bar narrower than the minimum is left out.
_BAR_WIDTH, _MIN_BAR_WIDTH = 30, 8

_STATE_LABELS = {
    "pending": "Pulling fs layer",
    "downloading": "Downloading",
    "verifying": "Verifying Checksum",
    "complete": "Download complete",
    "exists": "Already exists",
    "failed": "Failed",
}

EventHandler = Callable[[dict[str, Any]], None]


@contextmanager
def open_view(*, as_json: bool) -> Iterator[EventHandler]:
    """Yield a function that shows an event: images on stdout, everything else on stderr."""
    if as_json:
        yield _show_json
    elif sys.stderr.isatty():
        with _bar_view() as show:
            yield show
    else:
        yield _line_view()


def _show_json(event: dict[str, Any]) -> None:
    click.echo(json.dumps(event))
    if event["event"] == "referrer_missing":
        click.echo(_format_missing_referrer(event), err=True)


@dataclass(slots=True)
class TrackedLayer:
    """A layer of `size` bytes: `offset` are stored, `resumed` of them by an earlier download."""

    size: int
    state: str
    offset: int = 0
    resumed: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether its state is final."""
        return self.state in ("complete", "exists", "failed")


class ProgressTracker:
    """Adds up the events of one preload."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.layers: dict[str, TrackedLayer] = {}
        # The layers of images that are being fetched.
        self.images: dict[str, list[str]] = {}
        self.waiting: dict[str, str] = {}
        self.resolving = 0
        self.finished = 0
        self._now = now
        self._bytes_total = 0
        self._bytes_present = 0
        self._bytes_received = 0
        self._samples: deque[tuple[float, int]] = deque([(now(), 0)])

    @property
    def image_count(self) -> int:
        """Number of images."""
        return self.resolving + len(self.images) + self.finished

    @property
    def fraction(self) -> float:
        """Share of the bytes that are stored, from 0 to 1."""
        return self._bytes_present / self._bytes_total if self._bytes_total else 0.0

    def record(self, event: dict[str, Any]) -> None:
        """Add an event."""
        kind = event["event"]
        if kind == "resolving":
            self.resolving += 1
        elif kind == "resolved":
            self._on_resolved(event)
        elif kind == "layer":
            self._on_layer(event)
        elif kind in ("done", "failed"):
            self._on_finished(event)
        elif kind == "waiting":
            until = time.strftime("%H:%M:%S", time.localtime(event["until"]))
            self.waiting[event["upstream"]] = f"waiting until {until}: {event['reason']}"
        elif kind == "resumed":
            self.waiting.pop(event["upstream"], None)

    def summary(self) -> str:
        """Return images, bytes, rate and time left as one line."""
        rate = self._rate()
        parts = [
            f"{self.finished} of {format_count(self.image_count, 'image')}",
            f"{format_bytes(self._bytes_present)} of {format_bytes(self._bytes_total)}",
            f"{format_bytes(int(rate))}/s",
        ]
        if rate and self._bytes_present < self._bytes_total:
            left = (self._bytes_total - self._bytes_present) / rate
            parts.append(f"{format_duration(left)} left")
        return ", ".join(parts)

    def _on_resolved(self, event: dict[str, Any]) -> None:
        self.resolving -= 1
        self.images[event["image"]] = [layer["digest"] for layer in event["layers"]]
        for layer in event["layers"]:
            if layer["digest"] not in self.layers:
                state = "exists" if layer["exists"] else "pending"
                self.layers[layer["digest"]] = TrackedLayer(layer["size"], state)
                self._bytes_total += 0 if layer["exists"] else layer["size"]

    def _on_layer(self, event: dict[str, Any]) -> None:
        layer = self.layers.get(event["digest"])
        if layer is None or layer.state == "exists":
            return  # the layer of a signature, or one that is already stored
        resumed = event["resumed"] or layer.resumed
        received = max(0, event["offset"] - resumed)
        self._bytes_received += received - max(0, layer.offset - layer.resumed)
        self._bytes_present += event["offset"] - layer.offset
        layer.state, layer.offset, layer.resumed = event["state"], event["offset"], resumed
        now = self._now()
        self._samples.append((now, self._bytes_received))
        while len(self._samples) > 2 and self._samples[0][0] < now - _RATE_WINDOW:
            self._samples.popleft()

    def _on_finished(self, event: dict[str, Any]) -> None:
        self.finished += 1
        # An image that could not be resolved has no layers; a malformed name was never resolving.
        if event["image"] in self.images:
            del self.images[event["image"]]
        elif self.resolving:
            self.resolving -= 1

    def _rate(self) -> float:
        (started, before), (now, received) = self._samples[0], self._samples[-1]
        return (received - before) / (now - started) if now > started else 0.0


def _line_view() -> EventHandler:
    """Print a line per image to stdout, and the progress to stderr from time to time."""
    tracker, reported = ProgressTracker(), time.monotonic()

    def show(event: dict[str, Any]) -> None:
        nonlocal reported
        tracker.record(event)
        if event["event"] in ("done", "failed"):
            click.echo(_format_outcome(event))
        elif event["event"] == "waiting":
            text = tracker.waiting[event["upstream"]]
            click.echo(f"{event['upstream']}: {escape_unprintable(text)}", err=True)
        for line in _summary_lines(event):
            click.echo(line, err=True)
        if time.monotonic() - reported >= REPORT_INTERVAL:
            reported = time.monotonic()
            click.echo(tracker.summary(), err=True)

    return show


@contextmanager
def _bar_view() -> Iterator[EventHandler]:
    """Show a bar for each layer and one for all of them, below the images that are done."""
    from rich.console import Console  # noqa: PLC0415 - slow to import, used on a terminal only
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console, tracker = Console(stderr=True, highlight=False), ProgressTracker()

    def render() -> "Text":
        lines = _render_lines(tracker, console.width, console.height - 2)
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    with Live(
        console=console,
        get_renderable=render,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=False,
    ):

        def show(event: dict[str, Any]) -> None:
            tracker.record(event)
            if event["event"] in ("done", "failed"):
                if sys.stdout.isatty():
                    text = wrap(_format_outcome(event), console.width)
                    console.print(Text(text), soft_wrap=True)
                else:
                    click.echo(_format_outcome(event))
            for line in _summary_lines(event):
                console.print(Text(wrap(line, console.width)), soft_wrap=True)

        yield show


def _render_lines(tracker: ProgressTracker, width: int, height: int) -> list[str]:
    """Return the current state in at most `height` lines.

    If not all layers fit, active ones go before pending ones, and those before finished ones.
    """
    bar = min(_BAR_WIDTH, width - 65)
    bar = bar if bar >= _MIN_BAR_WIDTH else 0
    digests = dict.fromkeys(digest for layers in tracker.images.values() for digest in layers)
    rows = [(digest, tracker.layers[digest]) for digest in digests]
    active = [row for row in rows if row[1].state in ("downloading", "verifying")]
    pending = [row for row in rows if row[1].state == "pending"]
    finished = [row for row in rows if row[1].is_finished]
    shown = {digest for digest, _ in [*active, *pending, *finished][: max(1, height - 3)]}
    lines = [_render_layer(digest, layer, bar) for digest, layer in rows if digest in shown]
    lines += [f"{name}: {escape_unprintable(text)}" for name, text in tracker.waiting.items()]
    if tracker.resolving:
        lines.append(f"resolving {format_count(tracker.resolving, 'image')}")
    total = f"{_render_bar(tracker.fraction, bar)} " if bar else ""
    return [*lines, f"{total}{tracker.summary()}"]


def _render_layer(digest: str, layer: TrackedLayer, bar_width: int) -> str:
    name, label = digest.partition(":")[2][:12], _STATE_LABELS[layer.state]
    if layer.state not in ("downloading", "verifying"):
        return f"{name}: {label}"
    fraction = layer.offset / layer.size if layer.size else 1.0
    bar = f"{_render_bar(fraction, bar_width)} " if bar_width else ""
    return f"{name}: {label:<18} {bar}{format_bytes(layer.offset)}/{format_bytes(layer.size)}"


def _render_bar(fraction: float, width: int) -> str:
    """Return a bar that looks like docker's."""
    full = round(min(1.0, fraction) * width)
    head = ">" if full < width else ""
    return f"[{('=' * full + head).ljust(width)}]"


def _format_outcome(event: dict[str, Any]) -> str:
    """Return the outcome of an image as one line."""
    name = escape_unprintable(event["image"])
    if event["event"] == "failed":
        return f"{name}: failed: {escape_unprintable(event['reason'])}"
    size, fetched = format_bytes(event["size"]), format_bytes(event["fetched"])
    return {
        "fetched": f"{name}: Pull complete, {fetched} of {size} fetched",
        "up_to_date": f"{name}: Image is up to date",
        "would_fetch": f"{name}: would be fetched, {size}",
    }[event["outcome"]]


def _summary_lines(event: dict[str, Any]) -> list[str]:
    """Return lines for an event that does not end an image."""
    if event["event"] == "plan":
        return _format_plan(event)
    if event["event"] == "referrer_missing":
        return [_format_missing_referrer(event)]
    if event["event"] == "ripening":
        name, reason = escape_unprintable(event["image"]), escape_unprintable(event["reason"])
        return [f"{name}: {event['digest']} is fetched for later: {reason}"]
    return [_format_totals(event)] if event["event"] == "totals" else []


def _format_plan(event: dict[str, Any]) -> list[str]:
    size, missing = format_bytes(event["size"]), format_bytes(event["missing"])
    lines = [f"{format_count(event['images'], 'image')}, {size}, {missing} to fetch"]
    if event["shortfall"]:
        shortfall = format_bytes(event["shortfall"])
        lines.append(f"the store has no space for {shortfall}; images that do not fit are skipped")
    return lines


def _format_missing_referrer(event: dict[str, Any]) -> str:
    name, reason = escape_unprintable(event["image"]), escape_unprintable(event["reason"])
    if event["reference"]:
        what = f"{escape_unprintable(event['reference'])}, which refers to it, could not be fetched"
    else:
        what = f"what refers to {event['subject']} could not be listed"
    return f"{name}: {what}: {reason}"


def _format_totals(event: dict[str, Any]) -> str:
    parts = [
        format_count(event["images"], "image"),
        f"{event['fetched_images']} fetched ({format_bytes(event['fetched'])})",
        f"{event['up_to_date']} up to date",
        f"{event['failed']} failed",
    ]
    if event["missing_referrers"]:
        parts.append(f"{format_count(event['missing_referrers'], 'referrer')} missing")
    return ", ".join(parts)
