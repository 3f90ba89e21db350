"""Lock files as `pullcache preload --lock` writes them: images with their digests. Pure."""

from proxy.preload.lists.result import ParseResult
from proxy.preload.lists.yaml_documents import MappingNode

LOCK_KEY = "pullcache-lock"
LOCK_VERSION = "1"


def is_lock(root: MappingNode) -> bool:
    """Tell whether the document has the key of lock files."""
    return root.get(LOCK_KEY) is not None


def read_lock(root: MappingNode, result: ParseResult) -> None:
    """Read `images: [{image, digest, size, platforms}]`."""
    result.add_format("pullcache lock")
    version = root.get_text(LOCK_KEY)
    if version != LOCK_VERSION:
        result.add_problem(
            root.line,
            f"lock file version {version[:20]!r} is not supported: "
            f"this pullcache supports {LOCK_VERSION}",
        )
        return
    for entry in root.get_items("images"):
        name = entry.get_text("image") if isinstance(entry, MappingNode) else ""
        digest = entry.get_text("digest") if isinstance(entry, MappingNode) else ""
        if not isinstance(entry, MappingNode) or not (name and digest):
            result.add_problem(entry.line, "an image in a lock file needs image and digest")
            continue
        platforms = entry.get_texts("platforms")
        result.add_image(entry.line, name if "@" in name else f"{name}@{digest}", platforms)
