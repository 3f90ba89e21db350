"""The images requested of a preload, each one once with all its platforms."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.errors import ProxyError
from proxy.images.selection import ImageSelection, parse_platforms
from proxy.names import NameParser, display_name
from proxy.oci.platform import Platform
from proxy.oci.reference import Reference, Repository


@dataclass(slots=True, eq=False)
class RequestedImage:
    """An image, and its platforms as texts; "" stands for the daemon's own platform."""

    repository: Repository
    reference: Reference
    platforms: dict[str, None]

    @property
    def name(self) -> str:
        """The display name."""
        return display_name(self.repository, self.reference)

    def selection(self, native_platform: Platform) -> ImageSelection:
        """Return the selection that the offline check must find complete.

        If no platform was requested, the selection has none either, so that an image for one
        platform passes whatever that platform is.
        """
        platforms = [
            text or str(native_platform)
            for text in self.platforms
            if text or len(self.platforms) > 1
        ]
        return ImageSelection(self.name, tuple(platforms))

    def platforms_to_fetch(self, native_platform: Platform) -> list[Platform]:
        """Return the platforms to choose from an image index; an empty list stands for all."""
        texts = self.selection(native_platform).platforms
        return parse_platforms(texts or (str(native_platform),))


def merge_selections(
    selections: Iterable[ImageSelection],
    names: NameParser,
    on_error: Callable[[str, ProxyError], None],
) -> list[RequestedImage]:
    """Return the selected images, with the platforms of equal images merged.

    `on_error` is called for each selection whose image or platform is invalid or not allowed.
    """
    images: dict[tuple[Repository, Reference], RequestedImage] = {}
    for selection in selections:
        try:
            key = names.parse_allowed(selection.image)
            parse_platforms(selection.platforms)
        except ProxyError as error:
            on_error(selection.image[:200], error)
            continue
        image = images.setdefault(key, RequestedImage(*key, {}))
        image.platforms.update(dict.fromkeys(selection.platforms or ("",)))
    return list(images.values())
