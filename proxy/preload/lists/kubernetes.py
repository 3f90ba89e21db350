"""Kubernetes objects of every kind, custom ones too, and hauler's manifests. PURE.

An image is what stands under `image` wherever it stands, but for what is only said of objects (metadata,
status), or what is data or a schema.
"""

from proxy.oci.reference import is_host
from proxy.preload.lists.documents import MappingNode, ScalarNode, SequenceNode, YamlNode
from proxy.preload.lists.result import ParseResult

_CONTAINER_KEYS = {"containers", "initContainers", "ephemeralContainers"}
_SKIPPED_KEYS = {"metadata", "status"}
_KINDS_WITHOUT_IMAGES = {"ConfigMap", "CustomResourceDefinition", "Secret"}

# What names its images only to the tool that it is for.
_UNRENDERED_KINDS = {
    "Charts": "hauler's charts are not read: give the output of helm template",
    "HelmChart": "a chart names its images when it is rendered: give the output of helm template",
    "HelmRelease": "a chart names its images when it is rendered: give the output of helm template",
    "Kustomization": "a kustomization is input: give the output of kubectl kustomize",
}


def is_kubernetes(root: MappingNode) -> bool:
    """Tell by what every object has."""
    return bool(root.get_text("apiVersion") and root.get_text("kind"))


def read_kubernetes(root: MappingNode, result: ParseResult) -> None:
    """Read the images of an object, or of all in a list of objects."""
    if root.get_text("apiVersion").startswith("content.hauler.cattle.io/"):
        result.add_format("hauler")
        if root.get_text("kind") == "Images":
            _read_hauler(root, result)
            return
    else:
        result.add_format("Kubernetes")
    # What is still to be looked at, the next one last, and whether it is a list of containers.
    queue: list[tuple[YamlNode, bool]] = [(root, False)]
    seen: set[int] = set()
    while queue:
        node, in_containers = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, SequenceNode):
            queue += [(item, in_containers) for item in reversed(node.nodes)]
        elif isinstance(node, MappingNode):
            queue += reversed(_read_mapping(node, result, in_containers=in_containers))


def _read_mapping(
    node: MappingNode, result: ParseResult, *, in_containers: bool
) -> list[tuple[YamlNode, bool]]:
    """Add the image of a mapping; return where there may be more."""
    kind = node.get_text("kind") if "apiVersion" in node.fields else ""
    if kind in _KINDS_WITHOUT_IMAGES:
        return []
    if kind in _UNRENDERED_KINDS:
        result.add_problem(node.line, _UNRENDERED_KINDS[kind], "note")
        return []
    image = node.fields.get("image")
    if image is not None:
        _add_image(image, result, in_containers=in_containers)
    return [
        (value, key in _CONTAINER_KEYS)
        for key, value in node.fields.items()
        if key not in _SKIPPED_KEYS
    ]


def _add_image(image: YamlNode, result: ParseResult, *, in_containers: bool) -> None:
    """Add a text, an image volume's `reference`, or what operators write as `repository` and `tag`."""
    if isinstance(image, ScalarNode):
        # Elsewhere than in containers an `image` may be a picture.
        if image.text or in_containers:
            result.add_image(image.line, image.text, kind="error" if in_containers else "note")
    elif isinstance(image, MappingNode):
        if reference := image.get_text("reference"):
            result.add_image(image.line, reference)
        elif isinstance(image.get("repository"), ScalarNode):
            _add_split_image(image, result)


def _add_split_image(image: MappingNode, result: ParseResult) -> None:
    """Add `{registry, repository, tag, digest}`; without tag and digest only the operator knows."""
    registry, tag, digest = (image.get_text(key) for key in ("registry", "tag", "digest"))
    name = (
        f"{registry}/{image.get_text('repository')}" if registry else image.get_text("repository")
    )
    if tag or digest:
        result.add_image(image.line, name + (tag and f":{tag}") + (digest and f"@{digest}"))
    else:
        result.add_problem(
            image.line, f"{name[:60]!r} has neither tag nor digest: name it yourself"
        )


def _read_hauler(root: MappingNode, result: ParseResult) -> None:
    """Read `kind: Images`; annotations are what holds where an image says nothing."""
    annotations = root.get_mapping("metadata").get_mapping("annotations")
    registry = annotations.get_text("hauler.dev/registry")
    for item in root.get_mapping("spec").get_items("images"):
        if not isinstance(item, MappingNode) or not item.get_text("name"):
            result.add_problem(
                item.line, "an image of hauler's has a name: write - name: nginx:1.27"
            )
            continue
        name = item.get_text("name")
        if registry and not ("/" in name and is_host(name.partition("/")[0])):
            name = f"{registry}/{name}"
        platform = item.get_text("platform") or annotations.get_text("hauler.dev/platform")
        result.add_image(item.line, name, (platform,) if platform else ())
