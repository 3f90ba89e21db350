"""What a preload tells while it runs. Sizes are bytes, `image` is the name as people write it."""

from collections.abc import Sequence
from typing import Literal

import msgspec

LayerState = Literal["downloading", "verifying", "complete", "exists", "failed"]
Outcome = Literal["fetched", "up_to_date", "would_fetch"]


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something happened."""


class Layer(msgspec.Struct, frozen=True):
    """A layer, or a configuration, and whether it `exists` here."""

    digest: str
    size: int
    exists: bool


class Resolving(_Event, frozen=True, tag="resolving"):
    """Upstream is asked what an image is."""

    image: str


class Resolved(_Event, frozen=True, tag="resolved"):
    """What an image consists of, for the platforms that were chosen; `missing` bytes are not here.

    `name` is written in full, for a lock file; `referrers` are signatures, SBOMs and the like.
    """

    image: str
    name: str
    digest: str
    platforms: Sequence[str]
    layers: Sequence[Layer]
    size: int
    missing: int
    referrers: int


class Plan(_Event, frozen=True, tag="plan"):
    """What there is to do, before anything is fetched; images that have to wait for upstream come later.

    `lacking` bytes are more than the store has room for: images that do not fit have failed already.
    """

    images: int
    size: int
    missing: int
    lacking: int


class LayerProgress(_Event, frozen=True, tag="layer"):
    """How far a layer is: `offset` bytes are here, `resumed` of them since an earlier time."""

    digest: str
    state: LayerState
    offset: int = 0
    size: int = 0
    resumed: int = 0


class Done(_Event, frozen=True, tag="done"):
    """An image is in the store and can be pulled from it, or, of a dry run, would be fetched."""

    image: str
    digest: str
    outcome: Outcome
    size: int
    fetched: int


class Failed(_Event, frozen=True, tag="failed"):
    """An image could not be had; `code` is the error's."""

    image: str
    code: str
    reason: str


class Waiting(_Event, frozen=True, tag="waiting"):
    """An upstream is not asked before `until`, Unix time."""

    upstream: str
    reason: str
    until: float


class Resumed(_Event, frozen=True, tag="resumed"):
    """An upstream is asked again."""

    upstream: str


class Totals(_Event, frozen=True, tag="totals"):
    """How it ended: so many images, and bytes of layers that were fetched."""

    images: int
    fetched_images: int
    up_to_date: int
    failed: int
    fetched: int


Event = Resolving | Resolved | Plan | LayerProgress | Done | Failed | Waiting | Resumed | Totals
