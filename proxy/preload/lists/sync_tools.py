"""The lists of tools that copy between registries: skopeo sync, regsync, zot. PURE.

What chooses tags by a pattern would need the registry's list of tags, and is refused by name.
"""

from proxy.preload.lists.documents import MappingNode, ScalarNode, SequenceNode
from proxy.preload.lists.result import ParseResult

_PATTERN_KEYS = ("images-by-tag-regex", "images-by-semver")
_PATTERN_HELP = "chooses by a pattern among the registry's tags: name the tags"


def is_skopeo(root: MappingNode) -> bool:
    """Tell by a registry that has images."""
    return any(
        isinstance(registry, MappingNode)
        and any(isinstance(registry.get(key), MappingNode) for key in ("images", *_PATTERN_KEYS))
        for registry in root.fields.values()
    )


def read_skopeo(root: MappingNode, result: ParseResult) -> None:
    """Read `registry: {images: {repository: [tags and digests]}}` (skopeo-sync(1))."""
    result.add_format("skopeo sync")
    for host, registry in root.fields.items():
        if not isinstance(registry, MappingNode):
            result.add_problem(registry.line, f"the registry {host[:60]!r} has no images")
            continue
        for repository, tags in registry.get_mapping("images").fields.items():
            name = f"{host}/{repository}"
            if not isinstance(tags, SequenceNode) or not tags.nodes:
                result.add_problem(
                    tags.line, f"{name[:60]!r} means every tag there is: name the tags"
                )
                continue
            for tag in tags.nodes:
                text = tag.text if isinstance(tag, ScalarNode) else ""
                # What follows the colon or the at sign must be something, or it is no reference.
                result.add_image(tag.line, f"{name}{'@' if ':' in text else ':'}{text}")
        for key in _PATTERN_KEYS:
            for repository, pattern in registry.get_mapping(key).fields.items():
                result.add_problem(
                    pattern.line, f"{f'{host}/{repository}'[:60]!r} {_PATTERN_HELP} under images"
                )


def is_regsync(root: MappingNode) -> bool:
    """Tell by the list of what to copy."""
    return isinstance(root.get("sync"), SequenceNode)


def read_regsync(root: MappingNode, result: ParseResult) -> None:
    """Read `sync: [{source, type: image, platform}]`; targets are not ours."""
    result.add_format("regsync")
    for step in root.get_items("sync"):
        if not isinstance(step, MappingNode):
            result.add_problem(step.line, "a step of regsync's has a source, a target and a type")
            continue
        source, kind = step.get_text("source"), step.get_text("type")
        if kind == "image":
            platforms = [step.get_text("platform")] if step.get_text("platform") else []
            platforms += [
                one.text for one in step.get_items("platforms") if isinstance(one, ScalarNode)
            ]
            result.add_image(step.line, source, platforms)
        elif kind == "registry":
            result.add_problem(step.line, f"{source[:60]!r} is a whole registry: name its images")
        else:
            result.add_problem(step.line, f"{source[:60]!r} {_PATTERN_HELP}, each with type image")


def is_zot(root: MappingNode) -> bool:
    """Tell by the registries of zot's extension, alone or within zot's configuration."""
    return any(isinstance(part.get("registries"), SequenceNode) for part in _zot_sections(root))


def read_zot(root: MappingNode, result: ParseResult) -> None:
    """Name what zot would copy: it knows nothing but patterns."""
    result.add_format("zot sync")
    registries = [one for part in _zot_sections(root) for one in part.get_items("registries")]
    for registry in registries:
        content = registry.get_items("content") if isinstance(registry, MappingNode) else []
        for one in content:
            prefix = one.get_text("prefix") if isinstance(one, MappingNode) else ""
            result.add_problem(one.line, f"{prefix[:60]!r} {_PATTERN_HELP} in a plain list")


def _zot_sections(root: MappingNode) -> tuple[MappingNode, MappingNode]:
    return root, root.get_mapping("extensions").get_mapping("sync")
