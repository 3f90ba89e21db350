"""The lock file that a preload writes: each image with its digest, to be preloaded again exactly. PURE."""

from proxy.preload.lists.documents import Mapping, Scalar
from proxy.preload.lists.result import Found

KEY = "pullcache-lock"
VERSION = "1"


def is_lock(root: Mapping) -> bool:
    """Tell by the key that no other format has."""
    return root.get(KEY) is not None


def read_lock(root: Mapping, found: Found) -> None:
    """Read `images: [{image, digest, size, platforms}]`."""
    found.format("pullcache lock")
    version = root.text(KEY)
    if version != VERSION:
        found.problem(
            root.line, f"a lock of version {version[:20]!r}: this pullcache knows {VERSION}"
        )
        return
    for entry in root.items("images"):
        name = entry.text("image") if isinstance(entry, Mapping) else ""
        digest = entry.text("digest") if isinstance(entry, Mapping) else ""
        if not isinstance(entry, Mapping) or not (name and digest):
            found.problem(entry.line, "an image of a lock has a name and a digest")
            continue
        platforms = [one.text for one in entry.items("platforms") if isinstance(one, Scalar)]
        found.image(entry.line, name if "@" in name else f"{name}@{digest}", platforms)
