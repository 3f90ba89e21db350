"""The lists of tools that copy between registries: skopeo sync, regsync, zot. PURE.

What chooses tags by a pattern would need the registry's list of tags, and is refused by name.
"""

from proxy.preload.lists.documents import Items, Mapping, Scalar
from proxy.preload.lists.result import Found

_BY_PATTERN = ("images-by-tag-regex", "images-by-semver")
_HELP = "chooses by a pattern among the registry's tags: name the tags"


def is_skopeo(root: Mapping) -> bool:
    """Tell by a registry that has images."""
    return any(
        isinstance(registry, Mapping)
        and any(isinstance(registry.get(key), Mapping) for key in ("images", *_BY_PATTERN))
        for registry in root.fields.values()
    )


def read_skopeo(root: Mapping, found: Found) -> None:
    """Read `registry: {images: {repository: [tags and digests]}}` (skopeo-sync(1))."""
    found.format("skopeo sync")
    for host, registry in root.fields.items():
        if not isinstance(registry, Mapping):
            found.problem(registry.line, f"the registry {host[:60]!r} has no images")
            continue
        for repository, tags in registry.mapping("images").fields.items():
            name = f"{host}/{repository}"
            if not isinstance(tags, Items) or not tags.nodes:
                found.problem(tags.line, f"{name[:60]!r} means every tag there is: name the tags")
                continue
            for tag in tags.nodes:
                text = tag.text if isinstance(tag, Scalar) else ""
                # What follows the colon or the at sign must be something, or it is no reference.
                found.image(tag.line, f"{name}{'@' if ':' in text else ':'}{text}")
        for key in _BY_PATTERN:
            for repository, pattern in registry.mapping(key).fields.items():
                found.problem(pattern.line, f"{f'{host}/{repository}'[:60]!r} {_HELP} under images")


def is_regsync(root: Mapping) -> bool:
    """Tell by the list of what to copy."""
    return isinstance(root.get("sync"), Items)


def read_regsync(root: Mapping, found: Found) -> None:
    """Read `sync: [{source, type: image, platform}]`; targets are not ours."""
    found.format("regsync")
    for step in root.items("sync"):
        if not isinstance(step, Mapping):
            found.problem(step.line, "a step of regsync's has a source, a target and a type")
            continue
        source, kind = step.text("source"), step.text("type")
        if kind == "image":
            platforms = [step.text("platform")] if step.text("platform") else []
            platforms += [one.text for one in step.items("platforms") if isinstance(one, Scalar)]
            found.image(step.line, source, platforms)
        elif kind == "registry":
            found.problem(step.line, f"{source[:60]!r} is a whole registry: name its images")
        else:
            found.problem(step.line, f"{source[:60]!r} {_HELP}, each with type image")


def is_zot(root: Mapping) -> bool:
    """Tell by the registries of zot's extension, alone or within zot's configuration."""
    return any(isinstance(part.get("registries"), Items) for part in _zot_parts(root))


def read_zot(root: Mapping, found: Found) -> None:
    """Name what zot would copy: it knows nothing but patterns."""
    found.format("zot sync")
    registries = [one for part in _zot_parts(root) for one in part.items("registries")]
    for registry in registries:
        content = registry.items("content") if isinstance(registry, Mapping) else []
        for one in content:
            prefix = one.text("prefix") if isinstance(one, Mapping) else ""
            found.problem(one.line, f"{prefix[:60]!r} {_HELP} in a plain list")


def _zot_parts(root: Mapping) -> tuple[Mapping, Mapping]:
    return root, root.mapping("extensions").mapping("sync")
