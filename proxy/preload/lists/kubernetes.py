"""Kubernetes objects of every kind, custom ones too, and hauler's manifests. PURE.

An image is what stands under `image` wherever it stands, but for what is only said of objects (metadata,
status), or what is data or a schema.
"""

from proxy.oci.reference import is_host
from proxy.preload.lists.documents import Items, Mapping, Node, Scalar
from proxy.preload.lists.result import Found

_CONTAINERS = {"containers", "initContainers", "ephemeralContainers"}
_ABOUT = {"metadata", "status"}
_NO_IMAGES = {"ConfigMap", "CustomResourceDefinition", "Secret"}

# What names its images only to the tool that it is for.
_ELSEWHERE = {
    "Charts": "hauler's charts are not read: give the output of helm template",
    "HelmChart": "a chart names its images when it is rendered: give the output of helm template",
    "HelmRelease": "a chart names its images when it is rendered: give the output of helm template",
    "Kustomization": "a kustomization is input: give the output of kubectl kustomize",
}


def is_kubernetes(root: Mapping) -> bool:
    """Tell by what every object has."""
    return bool(root.text("apiVersion") and root.text("kind"))


def read_kubernetes(root: Mapping, found: Found) -> None:
    """Read the images of an object, or of all in a list of objects."""
    if root.text("apiVersion").startswith("content.hauler.cattle.io/"):
        found.format("hauler")
        if root.text("kind") == "Images":
            _hauler(root, found)
            return
    else:
        found.format("Kubernetes")
    # What is still to be looked at, the next one last, and whether it is a list of containers.
    queue: list[tuple[Node, bool]] = [(root, False)]
    seen: set[int] = set()
    while queue:
        node, in_containers = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Items):
            queue += [(item, in_containers) for item in reversed(node.nodes)]
        elif isinstance(node, Mapping):
            queue += reversed(_object(node, found, in_containers=in_containers))


def _object(node: Mapping, found: Found, *, in_containers: bool) -> list[tuple[Node, bool]]:
    """Add the image of a mapping; return where there may be more."""
    kind = node.text("kind") if "apiVersion" in node.fields else ""
    if kind in _NO_IMAGES:
        return []
    if kind in _ELSEWHERE:
        found.problem(node.line, _ELSEWHERE[kind], "note")
        return []
    image = node.fields.get("image")
    if image is not None:
        _image(image, found, in_containers=in_containers)
    return [(value, key in _CONTAINERS) for key, value in node.fields.items() if key not in _ABOUT]


def _image(image: Node, found: Found, *, in_containers: bool) -> None:
    """Add a text, an image volume's `reference`, or what operators write as `repository` and `tag`."""
    if isinstance(image, Scalar):
        # Elsewhere than in containers an `image` may be a picture.
        if image.text or in_containers:
            found.image(image.line, image.text, kind="error" if in_containers else "note")
    elif isinstance(image, Mapping):
        if reference := image.text("reference"):
            found.image(image.line, reference)
        elif isinstance(image.get("repository"), Scalar):
            _assembled(image, found)


def _assembled(image: Mapping, found: Found) -> None:
    """Add `{registry, repository, tag, digest}`; without tag and digest only the operator knows."""
    registry, tag, digest = (image.text(key) for key in ("registry", "tag", "digest"))
    name = f"{registry}/{image.text('repository')}" if registry else image.text("repository")
    if tag or digest:
        found.image(image.line, name + (tag and f":{tag}") + (digest and f"@{digest}"))
    else:
        found.problem(image.line, f"{name[:60]!r} has neither tag nor digest: name it yourself")


def _hauler(root: Mapping, found: Found) -> None:
    """Read `kind: Images`; annotations are what holds where an image says nothing."""
    annotations = root.mapping("metadata").mapping("annotations")
    registry = annotations.text("hauler.dev/registry")
    for item in root.mapping("spec").items("images"):
        if not isinstance(item, Mapping) or not item.text("name"):
            found.problem(item.line, "an image of hauler's has a name: write - name: nginx:1.27")
            continue
        name = item.text("name")
        if registry and not ("/" in name and is_host(name.partition("/")[0])):
            name = f"{registry}/{name}"
        platform = item.text("platform") or annotations.text("hauler.dev/platform")
        found.image(item.line, name, (platform,) if platform else ())
