from proxy.oci.manifest import OCI_INDEX, Manifest, parse_manifest
from proxy.policy.exemption import is_exempt

INDEX = parse_manifest(b'{"schemaVersion":2,"manifests":[]}', OCI_INDEX)


def is_index_exempt(content: bytes, index: Manifest = INDEX) -> bool:
    return is_exempt(index, content)


def test_an_index_is_exempt_only_if_all_that_it_lists_are_artifacts():
    assert is_index_exempt(b'{"manifests":[{"artifactType":"application/vnd.x"}]}')
    assert not is_index_exempt(b'{"manifests":[{"artifactType":"application/vnd.x"},{}]}')
    assert not is_index_exempt(b'{"manifests":[]}')
    assert not is_index_exempt(b'{"manifests":["x"]}')
    assert not is_index_exempt(
        b'{"manifests":[{"artifactType":"application/vnd.x","platform":{"os":"linux"}}]}'
    )
    assert not is_index_exempt(
        b'{"manifests":[{"artifactType":"application/vnd.oci.image.config.v1+json"}]}'
    )


def test_an_index_that_cannot_be_read_is_not_exempt():
    assert not is_index_exempt(b"not JSON")
    assert not is_index_exempt(b"[]")
