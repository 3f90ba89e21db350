"""The events of a preload as the lines of a job: one for each image, with its progress."""

from functools import singledispatch

from proxy.preload import events
from proxy.server.pages.page import JobLine
from proxy.sizes import format_bytes

# The key of the line about the whole preload.
_WHOLE = "whole"


class PreloadLines:
    """Turns the events of one preload into lines."""

    def __init__(self) -> None:
        self._layers: dict[str, dict[str, tuple[int, int]]] = {}
        self._images: dict[str, list[str]] = {}

    def describe(self, event: object) -> JobLine | None:
        """Return the line that shows an event."""
        if isinstance(event, events.ResolveFinished):
            return self._add_resolved(event)
        if isinstance(event, events.LayerProgress):
            return self._add_layer(event)
        if isinstance(event, events.ImageDone):
            self._layers.pop(event.image, None)
        return _describe(event)

    def _add_resolved(self, event: events.ResolveFinished) -> JobLine:
        self._layers[event.image] = {
            one.digest: (one.size if one.exists else 0, one.size) for one in event.layers
        }
        for layer in event.layers:
            self._images.setdefault(layer.digest, []).append(event.image)
        return self._line_of(event.image)

    def _add_layer(self, event: events.LayerProgress) -> JobLine | None:
        line = None
        is_whole = event.state in ("complete", "exists")
        for image in self._images.get(event.digest, ()):
            if layers := self._layers.get(image):
                layers[event.digest] = (event.size if is_whole else event.offset, event.size)
                line = self._line_of(image)
        return line

    def _line_of(self, image: str) -> JobLine:
        layers = self._layers[image].values()
        done, size = sum(one for one, _ in layers), sum(size for _, size in layers)
        text = f"{image}: {format_bytes(done)} of {format_bytes(size)}"
        return JobLine(text, image, share=done / size if size else 1.0)


@singledispatch
def _describe(_event: object) -> JobLine | None:
    """Return the line that shows an event, for which no earlier one is needed."""
    return None


@_describe.register
def _(event: events.ResolveStarted) -> JobLine:
    return JobLine(f"{event.image}: asking the registry", event.image)


@_describe.register
def _(event: events.ImageDone) -> JobLine:
    what = "is up to date" if event.outcome == "up_to_date" else "is here"
    text = f"{event.image} {what}: {format_bytes(event.size)}"
    return JobLine(text, event.image, share=1.0, image=event.image)


@_describe.register
def _(event: events.ImageFailed) -> JobLine:
    return JobLine(f"{event.image}: {event.reason}", event.image, is_problem=True)


@_describe.register
def _(event: events.PreloadPlan) -> JobLine:
    count = f"{event.images} image{'' if event.images == 1 else 's'}"
    return JobLine(f"{count}, {format_bytes(event.missing)} to fetch", _WHOLE)


@_describe.register
def _(event: events.UpstreamWaiting) -> JobLine:
    return JobLine(f"{event.upstream} is waited for: {event.reason}", event.upstream)


@_describe.register
def _(event: events.UpstreamResumed) -> JobLine:
    return JobLine(f"{event.upstream} answers again", event.upstream)


@_describe.register
def _(event: events.ReferrerMissing) -> JobLine:
    what = event.reference or "what refers to it"
    return JobLine(f"{event.image}: {what} could not be fetched: {event.reason}")


@_describe.register
def _(event: events.ImageRipening) -> JobLine:
    return JobLine(f"{event.image}: {event.reason}")


@_describe.register
def _(event: events.PreloadTotals) -> JobLine:
    fetched = format_bytes(event.fetched)
    text = (
        f"{event.images - event.failed} of {event.images} images are here; {fetched} were fetched"
    )
    if event.failed:
        text += f"; {event.failed} failed, see above"
    return JobLine(text, _WHOLE, is_problem=bool(event.failed))
