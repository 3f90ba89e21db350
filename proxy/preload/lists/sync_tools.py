"""The lists of tools that copy between registries: skopeo sync, regsync, zot. Pure.

Entries that select tags by a pattern are problems, because they need the registry's tag list.
"""

from proxy.preload.lists.result import ParseResult
from proxy.preload.lists.yaml_documents import MappingNode, ScalarNode, SequenceNode

_PATTERN_KEYS = ("images-by-tag-regex", "images-by-semver")
_PATTERN_HELP = "selects tags by a pattern: name the tags"


def is_skopeo(root: MappingNode) -> bool:
    """Tell whether the document maps registries to images."""
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
                result.add_problem(tags.line, f"{name[:60]!r} selects every tag: name the tags")
                continue
            for tag in tags.nodes:
                text = tag.text if isinstance(tag, ScalarNode) else ""
                # An empty tag leaves a colon at the end, which is reported as invalid.
                result.add_image(tag.line, f"{name}{'@' if ':' in text else ':'}{text}")
        for key in _PATTERN_KEYS:
            for repository, pattern in registry.get_mapping(key).fields.items():
                result.add_problem(
                    pattern.line, f"{f'{host}/{repository}'[:60]!r} {_PATTERN_HELP} under images"
                )


def is_regsync(root: MappingNode) -> bool:
    """Tell whether the document has a list of steps."""
    return isinstance(root.get("sync"), SequenceNode)


def read_regsync(root: MappingNode, result: ParseResult) -> None:
    """Read `sync: [{source, type: image, platform}]`; targets are ignored."""
    result.add_format("regsync")
    for step in root.get_items("sync"):
        if not isinstance(step, MappingNode):
            result.add_problem(step.line, "a regsync step needs source, target and type")
            continue
        source, kind = step.get_text("source"), step.get_text("type")
        if kind == "image":
            platform = step.get_text("platform")
            platforms = [platform] if platform else []
            result.add_image(step.line, source, [*platforms, *step.get_texts("platforms")])
        elif kind == "registry":
            result.add_problem(step.line, f"{source[:60]!r} is a whole registry: name its images")
        else:
            result.add_problem(step.line, f"{source[:60]!r} {_PATTERN_HELP}, each with type image")


def is_zot(root: MappingNode) -> bool:
    """Tell whether the document is zot's sync extension, alone or within zot's configuration."""
    return any(
        isinstance(section.get("registries"), SequenceNode) for section in _zot_sections(root)
    )


def read_zot(root: MappingNode, result: ParseResult) -> None:
    """Report what zot would copy: it selects by patterns only."""
    result.add_format("zot sync")
    registries = [
        registry for section in _zot_sections(root) for registry in section.get_items("registries")
    ]
    for registry in registries:
        content = registry.get_items("content") if isinstance(registry, MappingNode) else []
        for rule in content:
            prefix = rule.get_text("prefix") if isinstance(rule, MappingNode) else ""
            result.add_problem(rule.line, f"{prefix[:60]!r} {_PATTERN_HELP} in a plain list")


def _zot_sections(root: MappingNode) -> tuple[MappingNode, MappingNode]:
    return root, root.get_mapping("extensions").get_mapping("sync")
