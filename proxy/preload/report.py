"""The events and results of one preload, collected until its client reads them."""

from typing import Literal

from proxy.errors import ProxyError, error_code
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.preload import events
from proxy.preload.events import ImageOutcome, PreloadEvent, PreloadTotals
from proxy.storage.records.trail import Act

log = get_logger(__name__)


def record_totals(act: Act, totals: PreloadTotals) -> None:
    """Note the outcome of a preload in the audit trail."""
    act.detail = (
        f"{totals.fetched_images} of {totals.images} images fetched, {totals.failed} failed, "
        f"{totals.fetched} bytes"
    )
    if totals.failed:
        act.outcome = "failed"


class PreloadReport:
    """Collects events, and counts how many images have ended in which way.

    A `dry_run` counts no metrics.
    """

    def __init__(self, metrics: Metrics, *, dry_run: bool) -> None:
        self._metrics = metrics
        self._dry_run = dry_run
        self._events: list[PreloadEvent] = []
        self._missing_referrers = 0
        self._outcomes: list[ImageOutcome | Literal["failed"]] = []

    def add(self, event: PreloadEvent) -> None:
        """Add an event that is not the end of an image."""
        self._events.append(event)

    def add_missing_referrer(self, event: events.ReferrerMissing) -> None:
        """Add a referrer that could not be fetched to events, totals and the log."""
        log.warning(
            "referrer_missing",
            image=event.image,
            subject=event.subject,
            referrer=event.reference,
            reason=event.reason,
        )
        self._events.append(event)
        self._missing_referrers += 1

    def add_done(self, event: events.ImageDone) -> None:
        """Add the success of an image to events, totals and metrics."""
        self._add_outcome(event, event.outcome)

    def add_failed(self, image: str, error: ProxyError) -> None:
        """Add the failure of an image to events, totals and metrics."""
        event = events.ImageFailed(image=image, code=error_code(error), reason=str(error))
        self._add_outcome(event, "failed")

    def take_events(self) -> list[PreloadEvent]:
        """Return the events since the last call."""
        taken, self._events = self._events, []
        return taken

    def totals(self, fetched_bytes: int) -> events.PreloadTotals:
        """Return the totals of all images that have ended."""
        return events.PreloadTotals(
            images=len(self._outcomes),
            fetched_images=self._outcomes.count("fetched"),
            up_to_date=self._outcomes.count("up_to_date"),
            failed=self._outcomes.count("failed"),
            fetched=fetched_bytes,
            missing_referrers=self._missing_referrers,
        )

    def _add_outcome(self, event: PreloadEvent, outcome: ImageOutcome | Literal["failed"]) -> None:
        self._events.append(event)
        self._outcomes.append(outcome)
        if not self._dry_run:
            self._metrics.count_preloaded(has_failed=outcome == "failed")
