"""Manifests are parsed; what two parsers could read differently is rejected."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.errors import InvalidManifestError
from proxy.oci.digest import Digest
from proxy.oci.manifest import (
    ACCEPT,
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    MANIFEST_TYPES,
    MAX_MANIFEST_SIZE,
    OCI_INDEX,
    OCI_MANIFEST,
    Manifest,
    parse_manifest,
)
from proxy.oci.platform import Platform
from tests.fakes.content import FakeContent, digest_of

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"


def descriptor(content: bytes = b"", media_type: str = LAYER, **extra: Any) -> dict[str, Any]:
    """Return a descriptor."""
    return {
        "mediaType": media_type,
        "digest": digest_of(content),
        "size": len(content),
    } | extra


def image(**changes: Any) -> dict[str, Any]:
    """Return an image manifest with these fields changed; None removes a field."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"config", CONFIG),
        "layers": [descriptor(b"a"), descriptor(b"bc")],
    } | changes
    return {key: value for key, value in document.items() if value is not None}


def parse(document: object, content_type: str = OCI_MANIFEST) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), content_type)


@pytest.mark.parametrize("docker", [True, False])
def test_the_children_of_an_image_are_its_config_and_its_layers(docker):
    content = FakeContent()
    made = content.add_image(layers=[b"one", b"two"], docker=docker)
    raw = content.repository("library/app").manifests[made.digest]
    manifest = parse_manifest(raw.content, raw.media_type)
    assert [str(child.digest) for child in manifest.children] == list(made.blobs)
    assert [child.size for child in manifest.children][1:] == [3, 3]
    assert not manifest.is_index
    assert manifest.media_type == (DOCKER_MANIFEST if docker else OCI_MANIFEST)
    assert not any(child.is_foreign for child in manifest.children)


@pytest.mark.parametrize("docker", [True, False])
def test_the_children_of_an_index_are_manifests_with_their_platforms(docker):
    content = FakeContent()
    made = content.add_image(index=True, docker=docker)
    raw = content.repository("library/app").manifests[made.digest]
    manifest = parse_manifest(raw.content, raw.media_type)
    assert manifest.is_index
    assert manifest.media_type == (DOCKER_MANIFEST_LIST if docker else OCI_INDEX)
    assert {str(child.platform): str(child.digest) for child in manifest.children} == made.manifests
    arm = manifest.select_platform("linux", "arm64")
    assert str(arm) == made.manifests["linux/arm64"]
    assert manifest.select_platform("windows", "amd64") is None


def test_the_first_child_of_a_platform_is_selected():
    arm = {"os": "linux", "architecture": "arm"}
    index = parse(
        {
            "manifests": [
                descriptor(b"none", OCI_MANIFEST),
                descriptor(b"v7", OCI_MANIFEST, platform=arm | {"variant": "v7"}),
                descriptor(b"v6", OCI_MANIFEST, platform=arm | {"variant": "v6"}),
            ]
        },
        OCI_INDEX,
    )
    assert index.select_platform("linux", "arm") == Digest.from_content(b"v7")
    assert str(index.children[1].platform) == "linux/arm/v7"
    assert str(Platform("linux", "amd64")) == "linux/amd64"


def test_subject_artifact_type_and_annotations_are_parsed():
    fields = {"artifactType": "a/b", "annotations": {"k": "v"}, "unknown": [{}]}
    manifest = parse(image(subject=descriptor(b"subject"), **fields))
    assert manifest.subject == Digest.from_content(b"subject")
    assert manifest.artifact_type == "a/b"
    assert manifest.annotations == {"k": "v"}
    plain = parse(image())
    assert (plain.subject, plain.artifact_type, plain.annotations) == (None, CONFIG, {})
    assert parse({"manifests": []}, OCI_INDEX).artifact_type == ""


@pytest.mark.parametrize(
    ("layer", "foreign"),
    [
        (descriptor(), False),
        (descriptor(urls=["http://10.0.0.1/x"]), True),
        (descriptor(media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), True),
        (descriptor(media_type="application/vnd.oci.image.layer.nondistributable.v1.tar"), True),
    ],
)
def test_m07_foreign_layers_are_marked(layer, foreign):
    assert parse(image(layers=[layer])).children[1].is_foreign is foreign


def test_a_child_with_an_unknown_algorithm_is_left_out():
    unknown = descriptor() | {"digest": "blake3:" + "a" * 64}
    assert [child.digest for child in parse(image(layers=[unknown, descriptor()])).children] == [
        Digest.from_content(b"config"),
        Digest.from_content(b""),
    ]


@pytest.mark.parametrize(
    ("field", "header", "result"),
    [
        (OCI_MANIFEST, OCI_MANIFEST, OCI_MANIFEST),
        (None, OCI_MANIFEST, OCI_MANIFEST),
        ("", DOCKER_MANIFEST, DOCKER_MANIFEST),
        (OCI_MANIFEST, f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST),
        (OCI_MANIFEST, OCI_MANIFEST.upper(), OCI_MANIFEST),
        (OCI_MANIFEST, "text/plain", OCI_MANIFEST),
        (OCI_MANIFEST, "", OCI_MANIFEST),
        (DOCKER_MANIFEST, OCI_MANIFEST, None),
        (None, "text/html", None),
        (None, "", None),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", "application/json", None),
    ],
)
def test_the_header_and_the_media_type_field_must_agree(field, header, result):
    if result is None:
        with pytest.raises(InvalidManifestError):
            parse(image(mediaType=field), header)
    else:
        assert parse(image(mediaType=field), header).media_type == result


@pytest.mark.parametrize(
    "changes",
    [
        {"manifests": []},
        {"manifests": [descriptor(b"m", OCI_MANIFEST)]},
        {"config": None},
        {"layers": None},
        {"layers": {}},
        {"layers": [{}]},
        {"layers": [descriptor(size=-1)]},
        {"layers": [descriptor(size=1.5)]},
        {"layers": [descriptor(size="1")]},
        {"layers": [descriptor(size=2**70)]},
        {"layers": [descriptor(digest="sha256:../../x")]},
        {"layers": [descriptor(digest="sha256:" + "A" * 64)]},
        {"layers": [descriptor(digest="nonsense")]},
        {"subject": descriptor(digest="sha256:1")},
        {"annotations": {"k": 1}},
        {"mediaType": 5},
    ],
)
def test_an_invalid_manifest_is_rejected(changes):
    with pytest.raises(InvalidManifestError):
        parse(image(**changes))


@pytest.mark.parametrize(
    "document", [{}, {"manifests": [], "layers": []}, {"manifests": [], "config": descriptor()}]
)
def test_an_invalid_index_is_rejected(document):
    with pytest.raises(InvalidManifestError, match="an index must have manifests"):
        parse(document, OCI_INDEX)


GOOD = json.dumps(image()).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"<!doctype html>",
        GOOD[:-1],
        GOOD + b"x",
        GOOD[:-1] + b',"layers":[]}',
        GOOD[:-1] + b',"Layers":[]}',
        b'{"a":' * 200_000,
        b"[" * 200_000,
        b"\xef\xbb\xbf" + GOOD,
        GOOD.decode().encode("utf-16"),
        GOOD[:-1] + b',"x":NaN}',
        GOOD[:-1] + b',"x":"\xff"}',
        GOOD[:-1] + b',"x":"\xed\xa0\x80"}',
        GOOD[:-1] + b',"annotations":{"k":"\\ud800"}}',
        GOOD[:-1] + b',"x":' + b"1" * 5000 + b"}",
        GOOD + b" " * MAX_MANIFEST_SIZE,
    ],
    ids=lambda content: repr(content[-12:]) + str(len(content)),
)
def test_m03_bytes_that_parsers_could_read_differently_are_rejected(content):
    with pytest.raises(InvalidManifestError) as caught:
        parse_manifest(content, OCI_MANIFEST)
    assert len(str(caught.value)) <= 200


@given(st.binary(), st.sampled_from(sorted(MANIFEST_TYPES)))
def test_arbitrary_bytes_raise_no_other_error(content, content_type):
    with pytest.raises(InvalidManifestError):
        parse_manifest(content, content_type)


scalars = st.none() | st.integers(-2, 2) | st.sampled_from(["", "sha256:", OCI_INDEX, 0.5])
json_values = (
    scalars
    | st.lists(scalars, max_size=2)
    | st.lists(st.dictionaries(st.sampled_from(["digest", "size", "urls"]), scalars), max_size=2)
    | st.dictionaries(st.sampled_from(["mediaType", "digest", "size", "k"]), scalars)
)
fields = st.sampled_from(
    ["mediaType", "config", "layers", "manifests", "subject", "annotations", "artifactType", "x"]
)


@given(st.dictionaries(fields, json_values, max_size=3), st.sampled_from(sorted(MANIFEST_TYPES)))
def test_arbitrary_documents_raise_no_other_error(changes, content_type):
    try:
        manifest = parse(image(**changes), content_type)
    except InvalidManifestError:
        return
    assert manifest.media_type == content_type


def test_the_accept_header_lists_every_manifest_type():
    listed = {item.partition(";")[0].strip() for item in ACCEPT.split(",")}
    assert listed >= MANIFEST_TYPES
