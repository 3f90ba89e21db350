"""The lock file that a preload writes: each image with its digest, to be preloaded again exactly. PURE."""

from proxy.preload.lists.documents import MappingNode, ScalarNode
from proxy.preload.lists.result import ParseResult

LOCK_KEY = "pullcache-lock"
LOCK_VERSION = "1"


def is_lock(root: MappingNode) -> bool:
    """Tell by the key that no other format has."""
    return root.get(LOCK_KEY) is not None


def read_lock(root: MappingNode, result: ParseResult) -> None:
    """Read `images: [{image, digest, size, platforms}]`."""
    result.add_format("pullcache lock")
    version = root.get_text(LOCK_KEY)
    if version != LOCK_VERSION:
        result.add_problem(
            root.line, f"a lock of version {version[:20]!r}: this pullcache knows {LOCK_VERSION}"
        )
        return
    for entry in root.get_items("images"):
        name = entry.get_text("image") if isinstance(entry, MappingNode) else ""
        digest = entry.get_text("digest") if isinstance(entry, MappingNode) else ""
        if not isinstance(entry, MappingNode) or not (name and digest):
            result.add_problem(entry.line, "an image of a lock has a name and a digest")
            continue
        platforms = [
            one.text for one in entry.get_items("platforms") if isinstance(one, ScalarNode)
        ]
        result.add_image(entry.line, name if "@" in name else f"{name}@{digest}", platforms)
