"""The events of a preload, as the admin API sends them.

Sizes and offsets are bytes; `image` is the display name.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

LayerState = Literal["downloading", "verifying", "complete", "exists", "failed"]
ImageOutcome = Literal["fetched", "up_to_date", "would_fetch"]


class _EventBase(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """An event; its class is the field `event`."""


class ResolvedLayer(msgspec.Struct, frozen=True):
    """A layer or config, and whether it `exists` in the store."""

    digest: str
    size: int
    exists: bool


class ResolveStarted(_EventBase, frozen=True, tag="resolving"):
    """An image is being resolved."""

    image: str


class ResolveFinished(_EventBase, frozen=True, tag="resolved"):
    """The content of an image for the chosen platforms.

    `name` is the full name, for a lock file; the store lacks `missing` bytes; `referrers` counts
    signatures, SBOMs and the like.
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
    """What the preload will fetch, without the images that wait for their upstream.

    The store lacks `missing` bytes, and has no space for `shortfall` bytes: images that do not fit
    fail before anything is fetched.
    """

    images: int
    size: int
    missing: int
    shortfall: int


class LayerProgress(_EventBase, frozen=True, tag="layer"):
    """Progress of a layer: `offset` bytes are stored, `resumed` of them by an earlier download."""

    digest: str
    state: LayerState
    offset: int = 0
    size: int = 0
    resumed: int = 0


class ImageDone(_EventBase, frozen=True, tag="done"):
    """An image can be pulled from the store or, in a dry run, would be fetched."""

    image: str
    digest: str
    outcome: ImageOutcome
    size: int
    fetched: int


class ImageFailed(_EventBase, frozen=True, tag="failed"):
    """An image is not complete in the store; `code` is that of the error."""

    image: str
    code: str
    reason: str


class ReferrerMissing(_EventBase, frozen=True, tag="referrer_missing"):
    """A signature, SBOM or the like of an image could not be fetched; the image is not failed.

    `reference` is its digest or tag; "" if the referrers of `subject` could not be listed.
    """

    image: str
    subject: str
    reference: str
    reason: str


class ImageRipening(_EventBase, frozen=True, tag="ripening"):
    """A tag has moved to content that is too young for a policy, which is fetched for later.

    Until then the tag means what it meant before; `reason` says until when and why. It is also sent for an
    image that is refused until it is old enough.
    """

    image: str
    digest: str
    reason: str


class UpstreamWaiting(_EventBase, frozen=True, tag="waiting"):
    """The preload sends an upstream no request before `until`, Unix time."""

    upstream: str
    reason: str
    until: int


class UpstreamResumed(_EventBase, frozen=True, tag="resumed"):
    """The preload sends requests to an upstream again."""

    upstream: str


class PreloadTotals(_EventBase, frozen=True, tag="totals"):
    """The end of a preload: numbers of images and missing referrers, bytes of layers `fetched`."""

    images: int
    fetched_images: int
    up_to_date: int
    failed: int
    fetched: int
    missing_referrers: int


PreloadEvent = (
    ResolveStarted
    | ResolveFinished
    | PreloadPlan
    | LayerProgress
    | ImageDone
    | ImageFailed
    | ReferrerMissing
    | ImageRipening
    | UpstreamWaiting
    | UpstreamResumed
    | PreloadTotals
)
