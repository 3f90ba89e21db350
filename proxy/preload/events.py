"""What a preload tells while it runs. Sizes are bytes, `image` is the name as people write it."""

from collections.abc import Sequence
from typing import Literal

import msgspec

LayerState = Literal["downloading", "verifying", "complete", "exists", "failed"]
ImageOutcome = Literal["fetched", "up_to_date", "would_fetch"]


class _EventBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something happened."""


class ResolvedLayer(msgspec.Struct, frozen=True):
    """A layer, or a configuration, and whether it `exists` here."""

    digest: str
    size: int
    exists: bool


class ResolveStarted(_EventBase, frozen=True, tag="resolving"):
    """Upstream is asked what an image is."""

    image: str


class ResolveFinished(_EventBase, frozen=True, tag="resolved"):
    """What an image consists of, for the platforms that were chosen; `missing` bytes are not here.

    `name` is written in full, for a lock file; `referrers` are signatures, SBOMs and the like.
    """

    image: str
    name: str
    digest: str
    platforms: Sequence[str]
    layers: Sequence[ResolvedLayer]
    size: int
    missing: int
    referrers: int


class PreloadPlan(_EventBase, frozen=True, tag="plan"):
    """What there is to do, before anything is fetched; images that have to wait for upstream come later.

    The store lacks space for `shortfall` bytes: images that do not fit have failed already.
    """

    images: int
    size: int
    missing: int
    shortfall: int


class LayerProgress(_EventBase, frozen=True, tag="layer"):
    """How far a layer is: `offset` bytes are here, `resumed` of them since an earlier time."""

    digest: str
    state: LayerState
    offset: int = 0
    size: int = 0
    resumed: int = 0


class ImageDone(_EventBase, frozen=True, tag="done"):
    """An image is in the store and can be pulled from it, or, of a dry run, would be fetched."""

    image: str
    digest: str
    outcome: ImageOutcome
    size: int
    fetched: int


class ImageFailed(_EventBase, frozen=True, tag="failed"):
    """An image could not be had; `code` is the error's."""

    image: str
    code: str
    reason: str


class UpstreamWaiting(_EventBase, frozen=True, tag="waiting"):
    """An upstream is not asked before `until`, Unix time."""

    upstream: str
    reason: str
    until: float


class UpstreamResumed(_EventBase, frozen=True, tag="resumed"):
    """An upstream is asked again."""

    upstream: str


class PreloadTotals(_EventBase, frozen=True, tag="totals"):
    """How it ended: so many images, and bytes of layers that were fetched."""

    images: int
    fetched_images: int
    up_to_date: int
    failed: int
    fetched: int


PreloadEvent = (
    ResolveStarted
    | ResolveFinished
    | PreloadPlan
    | LayerProgress
    | ImageDone
    | ImageFailed
    | UpstreamWaiting
    | UpstreamResumed
    | PreloadTotals
)
