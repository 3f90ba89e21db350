"""One image: how to pull it, what it is made of, what its tag meant, and whether it is trusted."""

from proxy.images.inspect import ImageDetail, PlatformDetail
from proxy.names import OFFICIAL_PREFIX
from proxy.oci.reference import parse_image
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import Model, PageRequest
from proxy.server.pages.views import packages
from proxy.server.pages.views.connect import registry_address


async def show(request: PageRequest) -> Model:
    """Return the details of an image; the query chooses the platform whose layers are shown."""
    name = request.path_params["name"]
    image = await request.api.get("/api/v1/images/inspect", ImageDetail, image=name)
    status = await request.api.get("/api/v1/status", DaemonStatus)
    wanted = request.query.get("platform", "")
    platform = _choose_platform(image, wanted)
    shown = platform.state.platform if platform else ""
    return {
        **await packages.describe(request, name, shown),
        "image": image,
        "platform": platform,
        "pull_lines": pull_lines(image.name, registry_address(request.origin, status)),
    }


def _choose_platform(image: ImageDetail, wanted: str) -> PlatformDetail | None:
    """Return the platform that was asked for, else the first that is complete, else the first."""
    platforms = image.platforms
    for one in platforms:
        if wanted and one.state.platform == wanted:
            return one
    complete = [one for one in platforms if one.state.state == "complete"]
    return next(iter([*complete, *platforms]), None)


def pull_lines(name: str, registry: str) -> list[tuple[str, str]]:
    """Return the commands that pull an image from the cache at the URL `registry`, by client."""
    scheme, _, address = registry.partition("://")
    parsed = parse_image(name)
    path = name if parsed.host or "/" in parsed.path else f"{OFFICIAL_PREFIX}{name}"
    path = path.removeprefix("docker.io/")
    is_plain = scheme == "http"
    return [
        ("docker", f"docker pull {address}/{path}"),
        ("podman", f"podman pull {'--tls-verify=false ' if is_plain else ''}{address}/{path}"),
        ("ctr", f"ctr images pull {'--plain-http ' if is_plain else ''}{address}/{path}"),
    ]
