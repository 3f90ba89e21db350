"""How far a preload is, worked out from its events."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxy.cli.display.text import format_bytes, format_duration

# Seconds over which the rate is taken.
_RATE_WINDOW = 10.0
# In the words of `docker pull`.
STATE_LABELS = {
    "pending": "Pulling fs layer",
    "downloading": "Downloading",
    "verifying": "Verifying Checksum",
    "complete": "Download complete",
    "exists": "Already exists",
    "failed": "Failed",
}


@dataclass(slots=True)
class TrackedLayer:
    """A layer: `offset` of `size` bytes are here, `resumed` of them since an earlier time."""

    size: int
    state: str
    offset: int = 0
    resumed: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ("complete", "exists", "failed")


class ProgressTracker:
    """Adds up the events of one preload."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.layers: dict[str, TrackedLayer] = {}
        # Of those that are being fetched, the layers.
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
        """How many images there are."""
        return self.resolving + len(self.images) + self.finished

    @property
    def fraction(self) -> float:
        """How much of the bytes is here, of 1."""
        return self._bytes_present / self._bytes_total if self._bytes_total else 0.0

    def record(self, event: dict[str, Any]) -> None:
        """Take note of an event."""
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
        """Say in a line how far it is."""
        rate = self._rate()
        parts = [
            f"{self.finished} of {self.image_count} images",
            f"{format_bytes(self._bytes_present)} of {format_bytes(self._bytes_total)}",
            f"{format_bytes(int(rate))}/s",
        ]
        if rate and self._bytes_present < self._bytes_total:
            parts.append(
                f"{format_duration((self._bytes_total - self._bytes_present) / rate)} left"
            )
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
            return  # a signature's, or one that costs nothing
        resumed = event["resumed"] or layer.resumed
        self._bytes_received += max(0, event["offset"] - resumed) - max(
            0, layer.offset - layer.resumed
        )
        self._bytes_present += event["offset"] - layer.offset
        layer.state, layer.offset, layer.resumed = event["state"], event["offset"], resumed
        now = self._now()
        self._samples.append((now, self._bytes_received))
        while len(self._samples) > 2 and self._samples[0][0] < now - _RATE_WINDOW:
            self._samples.popleft()

    def _on_finished(self, event: dict[str, Any]) -> None:
        self.finished += 1
        # What could not be resolved has no layers; what could not be read was never asked about.
        if event["image"] in self.images:
            del self.images[event["image"]]
        elif self.resolving:
            self.resolving -= 1

    def _rate(self) -> float:
        (began, before), (now, received) = self._samples[0], self._samples[-1]
        return (received - before) / (now - began) if now > began else 0.0
