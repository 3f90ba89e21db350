"""Docker compose files (Compose Specification), with the images of all services. Pure."""

from proxy.preload.lists.result import ParseResult
from proxy.preload.lists.variables import VariableError, substitute
from proxy.preload.lists.yaml_documents import MappingNode, ScalarNode, SequenceNode, YamlNode


def is_compose(root: MappingNode) -> bool:
    """Tell whether the document has services or includes other compose files."""
    return isinstance(root.get("services"), MappingNode) or isinstance(
        root.get("include"), SequenceNode
    )


def read_compose(root: MappingNode, result: ParseResult) -> None:
    """Read the images of all services, of whatever profile."""
    result.add_format("docker compose")
    for included in root.get_items("include"):
        result.add_problem(included.line, "included files are not read: pass this file too", "note")
    for name, service in root.get_mapping("services").fields.items():
        if isinstance(service, MappingNode):
            _read_service(name, service, result)
        else:
            result.add_problem(service.line, f"the service {name[:60]!r} is not a mapping")


def _read_service(name: str, service: MappingNode, result: ParseResult) -> None:
    image = service.get("image")
    if isinstance(image, ScalarNode) and image.text:
        _add_image(image, service.get("platform"), result)
    elif image is not None and not isinstance(image, ScalarNode):
        result.add_problem(image.line, f"the image of {name[:60]!r} is not a string")
    else:
        result.add_problem(service.line, f"{name[:60]!r} {_explain_missing_image(service)}", "note")
    mounts = [volume for volume in service.get_items("volumes") if isinstance(volume, MappingNode)]
    for mount in mounts:
        source = mount.get("source")
        if isinstance(source, ScalarNode) and mount.get_text("type") == "image":
            _add_image(source, None, result)


def _add_image(image: ScalarNode, platform: YamlNode | None, result: ParseResult) -> None:
    try:
        reference = substitute(image.text, {})
        platform_text = substitute(platform.text, {}) if isinstance(platform, ScalarNode) else ""
    except VariableError as error:
        result.add_problem(image.line, str(error))
    else:
        result.add_image(image.line, reference, (platform_text,) if platform_text else ())


def _explain_missing_image(service: MappingNode) -> str:
    if service.get("build") is not None:
        return "is built, not pulled: pass its Dockerfile for the images it is built from"
    if service.get("extends") is not None:
        return "extends another service, whose image may be in another file"
    return "has neither image nor build: nothing to pull"
