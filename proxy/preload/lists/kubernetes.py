"""Kubernetes objects of every kind, custom resources included, and hauler manifests. Pure.

The value of any key `image` is an image, except in metadata, in status, and in objects that hold
data or a schema.
"""

from proxy.oci.reference import is_host
from proxy.preload.lists.result import ParseResult
from proxy.preload.lists.yaml_documents import MappingNode, ScalarNode, SequenceNode, YamlNode

_CONTAINER_KEYS = {"containers", "initContainers", "ephemeralContainers"}
_SKIPPED_KEYS = {"metadata", "status"}
_KINDS_WITHOUT_IMAGES = {"ConfigMap", "CustomResourceDefinition", "Secret"}

# Objects whose images are known only after another tool has rendered them.
_UNRENDERED_KINDS = {
    "Charts": "hauler charts are not read: use the output of helm template",
    "HelmChart": "a chart has no images before it is rendered: use the output of helm template",
    "HelmRelease": "a chart has no images before it is rendered: use the output of helm template",
    "Kustomization": "a kustomization is not rendered: use the output of kubectl kustomize",
}


def is_kubernetes(root: MappingNode) -> bool:
    """Tell whether the document has what every object has: apiVersion and kind."""
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
    # Nodes to read, the next one last, and whether each is in a list of containers.
    stack: list[tuple[YamlNode, bool]] = [(root, False)]
    seen: set[int] = set()
    while stack:
        node, in_containers = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, SequenceNode):
            stack += [(item, in_containers) for item in reversed(node.nodes)]
        elif isinstance(node, MappingNode):
            _read_image(node, result, in_containers=in_containers)
            stack += reversed(_nested_nodes(node))


def _read_image(node: MappingNode, result: ParseResult, *, in_containers: bool) -> None:
    """Add the image of a mapping, or a note if the mapping is an object to be rendered first."""
    kind = _object_kind(node)
    image = node.fields.get("image")
    if kind in _UNRENDERED_KINDS:
        result.add_problem(node.line, _UNRENDERED_KINDS[kind], "note")
    elif kind not in _KINDS_WITHOUT_IMAGES and image is not None:
        _add_image(image, result, in_containers=in_containers)


def _nested_nodes(node: MappingNode) -> list[tuple[YamlNode, bool]]:
    """Return the values of a mapping that may have images, and whether they are containers."""
    if _object_kind(node) in _KINDS_WITHOUT_IMAGES | _UNRENDERED_KINDS.keys():
        return []
    return [
        (value, key in _CONTAINER_KEYS)
        for key, value in node.fields.items()
        if key not in _SKIPPED_KEYS
    ]


def _object_kind(node: MappingNode) -> str:
    """Return the kind of an object; "" for any other mapping."""
    return node.get_text("kind") if "apiVersion" in node.fields else ""


def _add_image(image: YamlNode, result: ParseResult, *, in_containers: bool) -> None:
    """Add an image from a string, an image volume (`reference`), or `repository` and `tag`."""
    if isinstance(image, ScalarNode):
        # Outside of containers, `image` may also be a picture.
        if image.text or in_containers:
            result.add_image(image.line, image.text, kind="error" if in_containers else "note")
    elif isinstance(image, MappingNode):
        if reference := image.get_text("reference"):
            result.add_image(image.line, reference)
        elif isinstance(image.get("repository"), ScalarNode):
            _add_split_image(image, result)


def _add_split_image(image: MappingNode, result: ParseResult) -> None:
    """Add `{registry, repository, tag, digest}`; without tag or digest, the version is unknown."""
    registry, tag, digest = (image.get_text(key) for key in ("registry", "tag", "digest"))
    name = (
        f"{registry}/{image.get_text('repository')}" if registry else image.get_text("repository")
    )
    if tag or digest:
        result.add_image(image.line, name + (tag and f":{tag}") + (digest and f"@{digest}"))
    else:
        result.add_problem(
            image.line, f"{name[:60]!r} has neither tag nor digest: list the image yourself"
        )


def _read_hauler(root: MappingNode, result: ParseResult) -> None:
    """Read `kind: Images`; annotations are the defaults for its images."""
    annotations = root.get_mapping("metadata").get_mapping("annotations")
    registry = annotations.get_text("hauler.dev/registry")
    for item in root.get_mapping("spec").get_items("images"):
        if not isinstance(item, MappingNode) or not item.get_text("name"):
            result.add_problem(item.line, "a hauler image needs a name: write - name: nginx:1.27")
            continue
        name = item.get_text("name")
        if registry and not ("/" in name and is_host(name.partition("/")[0])):
            name = f"{registry}/{name}"
        platform = item.get_text("platform") or annotations.get_text("hauler.dev/platform")
        result.add_image(item.line, name, (platform,) if platform else ())
