"""The events and results of one preload, collected until its client reads them."""

from typing import Literal

from proxy.errors import ProxyError, error_code
from proxy.log import get_logger
from proxy.metrics import Metrics
from proxy.names import NameParser
from proxy.preload import events
from proxy.preload.events import ImageOutcome, PreloadEvent, PreloadTotals
from proxy.storage.records.trail import Act

log = get_logger(__name__)


class PreloadRecord:
    """What the audit trail says of a preload. `act` has the outcome as soon as the totals are added.

    If some images failed and others did not, the failed ones are an act of their own, `failure`, so that
    each image has its outcome.
    """

    def __init__(self, act: Act, names: NameParser) -> None:
        self.act = act
        self.failure: Act | None = None
        self.has_changes = False
        self._names = names
        self._done: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._reason = ""

    def add(self, event: PreloadEvent) -> None:
        """Add an event of the preload."""
        if isinstance(event, events.ImageDone):
            self._done[self._names.full_name(event.image)] = event.fetched
            self.has_changes |= event.outcome == "fetched"
        elif isinstance(event, events.ImageFailed):
            self._failed[self._names.full_name(event.image)] = 0
            self._reason = self._reason or f"{event.code}: {event.reason}"
            self.has_changes = True
        elif isinstance(event, PreloadTotals):
            self._add_totals(event)

    def _add_totals(self, totals: PreloadTotals) -> None:
        done, act = totals.images - totals.failed, self.act
        if done or not totals.failed:
            act.images = self._done
            act.detail = (
                f"{done} of {totals.images} complete, {totals.fetched_images} fetched, "
                f"{totals.fetched} bytes"
            )
        if totals.failed:
            failure = Act("preload", act.actor) if done else act
            failure.images, failure.outcome = self._failed, "failed"
            failure.detail = f"{totals.failed} of {totals.images}, {self._reason}"
            self.failure = failure if done else None


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
