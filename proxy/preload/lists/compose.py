"""Docker compose files (Compose Specification). PURE."""

from proxy.preload.lists.documents import Items, Mapping, Node, Scalar
from proxy.preload.lists.result import Found
from proxy.preload.lists.variables import VariableError, substitute


def is_compose(root: Mapping) -> bool:
    """Tell by the services, or by what includes them."""
    return isinstance(root.get("services"), Mapping) or isinstance(root.get("include"), Items)


def read_compose(root: Mapping, found: Found) -> None:
    """Read the images of all services, whatever their profiles."""
    found.format("docker compose")
    for included in root.items("include"):
        found.problem(included.line, "an included file is not read: give it too", "note")
    for name, service in root.mapping("services").fields.items():
        if isinstance(service, Mapping):
            _service(name, service, found)
        else:
            found.problem(service.line, f"the service {name[:60]!r} is not a mapping")


def _service(name: str, service: Mapping, found: Found) -> None:
    image = service.get("image")
    if isinstance(image, Scalar) and image.text:
        _image(image, service.get("platform"), found)
    elif image is not None and not isinstance(image, Scalar):
        found.problem(image.line, f"the image of {name[:60]!r} is not a text")
    else:
        found.problem(service.line, f"{name[:60]!r} {_why_no_image(service)}", "note")
    mounts = [volume for volume in service.items("volumes") if isinstance(volume, Mapping)]
    for mount in mounts:
        source = mount.get("source")
        if isinstance(source, Scalar) and mount.text("type") == "image":
            _image(source, None, found)


def _image(image: Scalar, platform: Node | None, found: Found) -> None:
    try:
        reference = substitute(image.text, {})
        wanted = substitute(platform.text, {}) if isinstance(platform, Scalar) else ""
    except VariableError as error:
        found.problem(image.line, str(error))
    else:
        found.image(image.line, reference, (wanted,) if wanted else ())


def _why_no_image(service: Mapping) -> str:
    if service.get("build") is not None:
        return "is built, not pulled: give its Dockerfile to have what it is built from"
    if service.get("extends") is not None:
        return "extends another service: its image is that one's, perhaps in another file"
    return "has neither image nor build: nothing to pull"
