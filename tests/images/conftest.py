"""Fixtures of the tests of stored images."""

import pytest

from tests.fakes.images import push_index, push_manifest
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OTHER, OWN


@pytest.fixture
def app(registry) -> dict[str, str]:
    """Digests by platform of an index for this machine and another, with an attestation."""
    manifests = {
        NATIVE: push_manifest(registry, APP, [BASE, OWN], platform=NATIVE),
        FOREIGN: push_manifest(registry, APP, [OTHER], platform=FOREIGN),
        "unknown/unknown": push_manifest(
            registry, APP, [b"provenance"], platform="unknown/unknown"
        ),
    }
    return manifests | {"index": push_index(registry, APP, "v1", manifests)}
