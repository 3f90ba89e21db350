"""Images that the tests of preloads push to the fake registry."""

from tests.fakes.content import FakeContent
from tests.fakes.images import push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OTHER, OWN


def push_app(
    registry: FakeContent, tag: str = "v1", *, repository: str = APP, layer: bytes = OWN
) -> dict[str, str]:
    """Push an index for this machine's platform, with `layer`, and for another platform.

    Returns the digests by platform, and that of the index as `index`.
    """
    manifests = {
        NATIVE: push_manifest(registry, repository, [BASE, layer], platform=NATIVE),
        FOREIGN: push_manifest(registry, repository, [BASE, OTHER], platform=FOREIGN),
    }
    return manifests | {"index": push_index(registry, repository, tag, manifests)}
