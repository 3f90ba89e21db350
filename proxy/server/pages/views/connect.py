"""Connect: the configuration files of clients, for the address at which this cache is reached."""

from urllib.parse import urlsplit

from proxy.config.client_files import CLIENT_FILES
from proxy.server.admin.status import DaemonStatus
from proxy.server.pages.page import Model, PageRequest
from proxy.server.setup.client_config import ClientConfig

CLIENT_NAMES = {
    "docker": "Docker",
    "containerd": "containerd, Kubernetes",
    "podman": "Podman, Buildah, skopeo",
    "buildkit": "BuildKit",
    "k3s": "k3s, RKE2",
    "crio": "CRI-O",
}


async def show(request: PageRequest) -> Model:
    """Return the files of one client."""
    status = await request.api.get("/api/v1/status", DaemonStatus)
    client = request.query.get("client", "docker")
    address = request.query.get("address", "").strip() or registry_address(request.origin, status)
    only = request.query.get("only") == "yes"
    found = await request.api.get(
        "/api/v1/client-config", ClientConfig, client=client, address=address, only=only
    )
    return {
        "config": found,
        "client": client,
        "only": only,
        "clients": {name: CLIENT_NAMES.get(name, name) for name in CLIENT_FILES},
    }


def registry_address(origin: str, status: DaemonStatus) -> str:
    """Return the URL of the registry for a browser at `origin`: the same host, the registry's port."""
    host = urlsplit(origin).hostname or "127.0.0.1"
    ports = [one.rpartition(":")[2] for one in status.addresses if not one.startswith("unix:")]
    port = ports[0] if ports else "5000"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if status.is_tls else 'http'}://{shown}:{port}"
