"""The offline check: which images could be pulled if no upstream were reachable.

A blob that is not linked to the image's repository counts as missing, because serving it takes a
request to upstream.
"""

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import msgspec

from proxy.errors import DeniedError, InvalidReferenceError
from proxy.images.selection import ImageSelection, parse_platforms
from proxy.images.store import ImageStore
from proxy.images.tree import ImageState, ManifestNode, MissingBlob, load_image
from proxy.images.trust import PolicySummary, describe_policy
from proxy.names import display_name
from proxy.oci.platform import Platform, choose_platform
from proxy.policy.rules import RuleSet
from proxy.storage.image_queries import ImageQueries

_BATCH_SIZE = 50


class ImageCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an image for one platform.

    `size` counts bytes in the store; `reason` says why the image is not complete. `policy` is what the
    policies say of it, which does not change the state.
    """

    image: str
    platform: str
    state: ImageState
    digest: str | None = None
    size: int = 0
    missing: Sequence[MissingBlob] = ()
    reason: str = ""
    policy: PolicySummary | None = None


class OfflineChecker:
    """Checks images of one store."""

    def __init__(
        self,
        image_store: ImageStore,
        native_platform: Platform,
        rules: RuleSet,
        clock: Callable[[], float],
    ) -> None:
        self._image_store = image_store
        self._native_platform = native_platform
        self._rules = rules
        self._clock = clock

    async def check(self, selections: Sequence[ImageSelection]) -> AsyncGenerator[ImageCheck, None]:
        """Yield a check for each image and platform, in order.

        An invalid or denied name yields the state `absent` and the reason. Raises `StorageError`.
        """
        remaining = iter(selections)
        while batch := list(islice(remaining, _BATCH_SIZE)):
            for check in await self._image_store.query(partial(self._check_batch, batch)):
                yield check

    def _check_batch(
        self, selections: Sequence[ImageSelection], queries: ImageQueries
    ) -> list[ImageCheck]:
        return [
            check for selection in selections for check in self._check_image(queries, selection)
        ]

    def _check_image(
        self, queries: ImageQueries, selection: ImageSelection
    ) -> Iterator[ImageCheck]:
        requested = selection.platforms or (str(self._native_platform),)
        try:
            repository, reference = self._image_store.names.parse_allowed(selection.image)
            platforms = parse_platforms(requested)
        except (InvalidReferenceError, DeniedError) as error:
            yield _absent_check(selection.image, ", ".join(requested), str(error))
            return
        name = display_name(repository, reference)
        top = load_image(self._image_store, queries, repository, reference)
        # A damaged manifest cannot be served, so it counts as absent.
        if top is None or top.manifest is None:
            for text in requested:
                yield _absent_check(name, text, "not in the store")
            return
        is_explicit = bool(selection.platforms)
        policy = describe_policy(
            queries, self._rules, repository, reference, top.digest, self._clock()
        )
        for platform, node in _match_platforms(top, platforms, is_explicit=is_explicit):
            if node is None:
                offered = ", ".join(str(one.platform) for one in top.platform_manifests())
                reason = f"the image is for {offered or 'no platform'} only"
                yield _absent_check(name, platform, reason[:200])
            else:
                yield _check_node(name, platform, node, policy)


def _match_platforms(
    top: ManifestNode, platforms: Sequence[Platform], *, is_explicit: bool
) -> list[tuple[str, ManifestNode | None]]:
    """Return the manifest that a client of each platform takes; without platforms, all manifests.

    A single manifest is taken whatever its platform, unless the platforms are `is_explicit`.
    """
    manifests = top.platform_manifests()
    if not platforms:
        return [(str(node.platform or ""), node) for node in manifests]
    if manifests == [top] and (not is_explicit or top.platform is None):
        return [(str(top.platform or platform), top) for platform in platforms]
    candidates = [(node.platform, node) for node in manifests]
    return [(str(platform), choose_platform(candidates, platform)) for platform in platforms]


def _check_node(
    name: str, platform: str, node: ManifestNode, policy: PolicySummary | None
) -> ImageCheck:
    state = node.platform_state()
    is_complete = state.state == "complete"
    return ImageCheck(
        image=name,
        platform=platform,
        state=state.state,
        digest=state.digest,
        size=state.size,
        missing=state.missing,
        reason="" if is_complete else node.problem or "some of its blobs are not in the store",
        policy=policy,
    )


def _absent_check(image: str, platform: str, reason: str) -> ImageCheck:
    return ImageCheck(image=image, platform=platform, state="absent", reason=reason)
