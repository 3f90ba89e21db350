"""Manifests are parsed as leniently as clients do; only a document of two kinds is rejected."""

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
    OCI_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    ORAS_ARTIFACT,
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
    assert plain.manifests == ()
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


@pytest.mark.parametrize(
    ("field", "header", "result"),
    [
        (OCI_MANIFEST, OCI_MANIFEST, OCI_MANIFEST),
        (OCI_MANIFEST, f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST),
        (OCI_MANIFEST, OCI_MANIFEST.upper(), OCI_MANIFEST),
        (OCI_MANIFEST.upper(), OCI_MANIFEST, OCI_MANIFEST),
        (OCI_MANIFEST, "text/plain", OCI_MANIFEST),
        (OCI_MANIFEST, "", OCI_MANIFEST),
        (DOCKER_MANIFEST, OCI_MANIFEST, DOCKER_MANIFEST),
        (OCI_MANIFEST, DOCKER_MANIFEST, OCI_MANIFEST),
        # Without the field, the other fields tell, not the header.
        (None, OCI_MANIFEST, OCI_MANIFEST),
        (None, DOCKER_MANIFEST, OCI_MANIFEST),
        ("", OCI_MANIFEST, OCI_MANIFEST),
        (5, OCI_MANIFEST, OCI_MANIFEST),
        ("a/b", OCI_MANIFEST, OCI_MANIFEST),
        ("a/b", "application/vnd.acme.manifest", OCI_MANIFEST),
        ("application/vnd.acme.manifest", "application/vnd.acme.manifest", None),
    ],
)
def test_the_media_type_is_what_the_document_states(field, header, result):
    manifest = parse(image(mediaType=field), header)
    assert manifest.media_type == (result or header)
    assert len(manifest.children) == 3
    assert not manifest.unread
    assert not manifest.is_index


def test_a_document_without_a_media_type_is_recognised_by_its_fields():
    config = descriptor(b"config", "application/vnd.docker.container.image.v1+json")
    assert parse(image(mediaType=None, config=config)).media_type == DOCKER_MANIFEST
    for header in (OCI_INDEX, DOCKER_MANIFEST_LIST, "text/plain"):
        assert parse({"manifests": []}, header).media_type == OCI_INDEX
    assert parse({}, DOCKER_MANIFEST).media_type == DOCKER_MANIFEST
    for header in ("", "not a type", "x" * 300 + "/y"):
        assert parse({}, header).media_type == "application/octet-stream"


SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"


@pytest.mark.parametrize(
    ("document", "header"),
    [
        ({}, ""),
        ({}, "application/json"),
        ({"config": {"Cmd": ["sh"]}, "layers": []}, "application/json"),
        ({"mediaType": "application/json", "manifests": []}, "application/json"),
        ({"errors": []}, "application/json"),
        ({"schemaVersion": 1, "fsLayers": [], "signatures": []}, SCHEMA_1),
    ],
)
def test_a_document_that_nothing_calls_a_manifest_is_doubtful(document, header):
    assert parse(document, header).doubt.startswith("not a manifest: sent as ")
    for manifest in (image(), image(mediaType=None), image(mediaType="application/json")):
        assert parse(manifest, header).doubt == ""
        assert parse(manifest, header).is_stated is (manifest.get("mediaType") == OCI_MANIFEST)


@pytest.mark.parametrize("media_type", [OCI_ARTIFACT, ORAS_ARTIFACT])
def test_the_children_of_an_artifact_manifest_are_its_blobs(media_type):
    document = {
        "mediaType": media_type,
        "artifactType": "application/x",
        "blobs": [descriptor(b"a"), descriptor(b"b")],
        "subject": descriptor(b"subject"),
    }
    for body, header in ((document, media_type), (document, "application/json")):
        manifest = parse(body, header)
        assert [child.size for child in manifest.blobs] == [1, 1]
        assert manifest.layers == manifest.blobs
        assert manifest.config is None
        assert manifest.subject == Digest.from_content(b"subject")
        assert (manifest.media_type, manifest.doubt, manifest.unread) == (media_type, "", "")
    assert parse({"blobs": [descriptor(b"a")]}, OCI_MANIFEST).children == ()


def test_an_index_of_blobs_is_no_index_of_manifests():
    layer, manifest = descriptor(b"layer"), descriptor(b"manifest", OCI_MANIFEST)
    config = descriptor(b"config", "application/vnd.buildkit.cacheconfig.v0")
    cache = parse({"manifests": [layer, config]}, OCI_INDEX)
    assert not cache.is_index
    assert cache.blobs == cache.layers == cache.children
    assert len(cache.children) == 2
    assert cache.manifests == ()
    mixed = parse({"manifests": [layer, manifest, descriptor(b"x", "")]}, OCI_INDEX)
    assert mixed.is_index
    assert [child.size for child in mixed.manifests] == [8, 1]
    assert [child.size for child in mixed.blobs] == [5]
    assert parse({}, OCI_INDEX).is_index


ABSENT: Any = object()


@pytest.mark.parametrize("value", [ABSENT, None, 5, "text", [], {}, [None], [5], [[]], True])
@pytest.mark.parametrize(
    "name",
    ["schemaVersion", "mediaType", "config", "layers", "subject", "artifactType", "annotations"],
)
def test_any_field_may_be_absent_or_of_another_type(name, value):
    document = image() | {name: value}
    if value is ABSENT:
        del document[name]
    manifest = parse(document)
    children = [child.media_type for child in manifest.children]
    is_right = value in (ABSENT, None) or (name, value) == ("layers", [])
    if name == "config":
        assert children == [LAYER, LAYER]
        assert manifest.config is None
        assert bool(manifest.unread) is not is_right
    elif name == "layers":
        assert children == [CONFIG]
        assert bool(manifest.unread) is not is_right
    else:
        assert children == [CONFIG, LAYER, LAYER]
        assert manifest.unread == ""
    assert (manifest.media_type, manifest.doubt) == (OCI_MANIFEST, "")
    assert len(manifest.unread) <= 100


@pytest.mark.parametrize("value", [ABSENT, None, 5, "text", {}, [None], [{}]])
def test_the_manifests_of_an_index_may_be_absent_or_of_another_type(value):
    document = {"mediaType": OCI_INDEX} | ({} if value is ABSENT else {"manifests": value})
    manifest = parse(document, OCI_INDEX)
    assert manifest.children == ()
    assert manifest.is_index
    assert bool(manifest.unread) is (value not in (ABSENT, None))


@pytest.mark.parametrize(
    "size", ["null", "-1", "1.5", "1.0", '"1"', str(2**70), "true", "[]", "1" * 5000]
)
def test_a_child_may_state_no_size(size):
    document = json.dumps(image(layers=[descriptor() | {"size": "SIZE"}, descriptor(b"bc")]))
    for text in (document.replace('"SIZE"', size), document.replace(', "size": "SIZE"', "")):
        manifest = parse_manifest(text.encode(), OCI_MANIFEST)
        assert [child.size for child in manifest.layers] == [None, 2]
        assert manifest.unread == ""


@pytest.mark.parametrize("name", ["mediaType", "urls", "platform", "annotations", "data"])
@pytest.mark.parametrize("value", [ABSENT, None, 5, "", [], {}, False])
def test_the_other_fields_of_a_child_may_be_absent_or_of_another_type(name, value):
    layer = descriptor() | {name: value}
    if value is ABSENT:
        del layer[name]
    manifest = parse(image(layers=[layer]))
    (child,) = manifest.layers
    assert child.digest == Digest.from_content(b"")
    assert child.media_type == ("" if name == "mediaType" else LAYER)
    assert child.platform is None
    assert child.is_foreign is ((name, value) == ("urls", 5))
    assert manifest.unread == ""


@pytest.mark.parametrize(
    "digest",
    [
        *(ABSENT, None, 5, "", "nonsense", "sha256:../../x", "sha256:" + "A" * 64),
        *("sha256:" + "a" * 63, "sha512:" + "a" * 64, "sha256:" + "a" * 64 + "\x00"),
        "blake3:" + "a" * 64,
    ],
)
def test_a_child_whose_digest_cannot_be_verified_is_left_out_and_said(digest):
    bad = descriptor() | {"digest": digest}
    if digest is ABSENT:
        del bad["digest"]
    manifest = parse(image(layers=[bad, descriptor(b"bc")]))
    assert [child.size for child in manifest.layers] == [2]
    assert manifest.unread.endswith("is not a digest that can be verified")
    subject = parse(image(subject=bad))
    assert (subject.subject, subject.unread) == (None, "")


@pytest.mark.parametrize(
    ("platform", "result"),
    [
        ({}, None),
        ({"architecture": "amd64"}, Platform("linux", "amd64")),
        ({"os": "linux"}, None),
        ({"os": None, "architecture": None}, None),
        ({"os": 1, "architecture": "amd64"}, Platform("linux", "amd64")),
        ({"os": "linux", "architecture": "arm", "variant": None}, Platform("linux", "arm")),
        ({"OS": "linux", "Architecture": "arm"}, Platform("linux", "arm")),
    ],
)
def test_a_platform_needs_an_architecture(platform, result):
    index = parse({"manifests": [descriptor(b"x", OCI_MANIFEST, platform=platform)]}, OCI_INDEX)
    assert index.manifests[0].platform == result


def test_annotations_that_are_no_texts_are_left_out():
    annotations = {"Maintainer": "A", "maintainer": "B", "null": None, "number": 1, "s": "\ud800"}
    assert parse(image(annotations=annotations)).annotations == {
        "Maintainer": "A",
        "maintainer": "B",
        "null": "",
        "s": "\ufffd",
    }


GOOD = json.dumps(image()).encode()
AGAIN = json.dumps([descriptor(b"other")]).encode()


@pytest.mark.parametrize("name", [b"layers", b"Layers", b"LAYERS", "layer\u017f".encode()])
def test_a_name_may_differ_by_case_only_and_occur_twice(name):
    only = parse_manifest(GOOD.replace(b"layers", name), OCI_MANIFEST)
    assert [child.size for child in only.layers] == [1, 2]
    for again in (b"null", json.dumps(image()["layers"]).encode()):
        manifest = parse_manifest(GOOD[:-1] + b',"%s":%s}' % (name, again), OCI_MANIFEST)
        assert [child.size for child in manifest.layers] == [1, 2]
        assert manifest.unread == ""
    # Parsers take the first or the last, so neither is indexed.
    manifest = parse_manifest(GOOD[:-1] + b',"%s":%s}' % (name, AGAIN), OCI_MANIFEST)
    assert manifest.layers == ()
    assert manifest.unread == "its layers are not one list"


def test_what_two_parsers_could_read_differently_in_a_child_is_left_out():
    digests = b'"digest":"%s","Digest"' % digest_of(b"other").encode()
    two = parse_manifest(GOOD.replace(b'"digest"', digests, 1), OCI_MANIFEST)
    assert two.config is None
    assert two.unread
    sizes = parse_manifest(GOOD.replace(b'"size": 1', b'"size":1,"Size":9', 1), OCI_MANIFEST)
    assert [child.size for child in sizes.layers] == [None, 2]
    configs = parse_manifest(GOOD[:-1] + b',"Config":%s}' % AGAIN[1:-1], OCI_MANIFEST)
    assert configs.config is None
    assert configs.unread == "it has several configs"
    subject = json.dumps(image(subject=descriptor(b"s"))).encode()
    assert (
        parse_manifest(subject[:-1] + b',"Subject":%s}' % AGAIN[1:-1], OCI_MANIFEST).subject is None
    )


@pytest.mark.parametrize(
    ("document", "header"),
    [
        (image(manifests=[]), OCI_MANIFEST),
        (image(manifests=[descriptor(b"m", OCI_MANIFEST)]), OCI_MANIFEST),
        (image(manifests={}), "application/json"),
        (image(Manifests=[]), OCI_MANIFEST),
        (image(mediaType=OCI_INDEX), OCI_MANIFEST),
        (image(MediaType=DOCKER_MANIFEST_LIST), OCI_MANIFEST),
        (image(mediaType=OCI_INDEX), OCI_INDEX),
        (image(), OCI_INDEX),
        (image(mediaType=None), OCI_INDEX),
        ({"manifests": [], "layers": []}, OCI_INDEX),
        ({"manifests": [], "config": descriptor()}, OCI_INDEX),
        ({"manifests": [], "fsLayers": []}, OCI_INDEX),
        ({"manifests": []}, OCI_MANIFEST),
        ({"manifests": []}, ORAS_ARTIFACT),
        ({"mediaType": OCI_INDEX}, DOCKER_MANIFEST),
    ],
)
def test_m04_a_document_that_is_an_index_and_a_manifest_is_rejected(document, header):
    with pytest.raises(InvalidManifestError, match="both an image index and a manifest"):
        parse(document, header)


def test_m04_a_null_makes_no_document_ambiguous():
    assert not parse(image() | {"manifests": None}).is_index
    assert parse({"manifests": [], "layers": None, "config": None}, OCI_INDEX).is_index


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b"<!doctype html>",
        GOOD[:-1],
        b"x" + GOOD,
        b'{"a":' * 200_000,
        b"[" * 200_000,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
        b"\xef\xbb\xbf" + GOOD,
        GOOD.decode().encode("utf-16"),
        GOOD[:-1] + b',"x":NaN}',
    ],
    ids=lambda content: repr(content[-12:]) + str(len(content)),
)
def test_m03_bytes_that_cannot_be_read_have_no_children(content):
    manifest = parse_manifest(content, OCI_MANIFEST)
    assert (manifest.media_type, manifest.children) == (OCI_MANIFEST, ())
    assert manifest.unread == manifest.doubt
    assert manifest.doubt.startswith("not a manifest: ")
    assert len(manifest.doubt) <= 120


@pytest.mark.parametrize("rest", [b"\n", b"x", b"\n<!-- page -->", GOOD, b"[" * 200_000])
def test_m03_what_follows_the_document_does_not_matter(rest):
    manifest = parse_manifest(b"\r\n " + GOOD + rest, OCI_MANIFEST)
    assert manifest == parse_manifest(GOOD, OCI_MANIFEST)
    assert len(manifest.children) == 3


@pytest.mark.parametrize(
    "field",
    [
        b'"x":"\xff"',
        b'"x":"\xed\xa0\x80"',
        b'"x":"\\ud800"',
        b'"annotations":{"k":"\\ud800"}',
        b'"x":' + b"1" * 5000,
        b'"x":1e999',
        b'"a":1,"A":2,"a":3',
    ],
)
def test_m03_oddities_of_fields_that_are_not_read_do_not_matter(field):
    manifest = parse_manifest(GOOD[:-1] + b"," + field + b"}", OCI_MANIFEST)
    assert len(manifest.children) == 3
    assert (manifest.unread, manifest.doubt) == ("", "")
    json.dumps(manifest.annotations, ensure_ascii=False).encode()


def test_m01_a_document_beyond_the_limit_is_rejected():
    assert parse_manifest(GOOD + b" " * (MAX_MANIFEST_SIZE - len(GOOD)), "").children
    with pytest.raises(InvalidManifestError, match="larger than"):
        parse_manifest(GOOD + b" " * MAX_MANIFEST_SIZE, OCI_MANIFEST)


def test_m02_many_names_that_differ_by_case_take_one_pass():
    names = b"".join(b',"%s":[%d]' % (b"layers", n) for n in range(200_000))
    assert parse_manifest(GOOD[:-1] + names + b"}", OCI_MANIFEST).layers == ()


@given(st.binary(), st.sampled_from(sorted(MANIFEST_TYPES)))
def test_arbitrary_bytes_raise_no_error(content, content_type):
    assert parse_manifest(content, content_type).media_type == content_type


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
    assert manifest.media_type in MANIFEST_TYPES
    assert manifest.doubt == ""


def test_the_accept_header_lists_every_manifest_type():
    listed = {item.partition(";")[0].strip() for item in ACCEPT.split(",")}
    assert listed >= MANIFEST_TYPES


@pytest.mark.parametrize("text", ["", "sha256:x", digest_of(b"attested")])
def test_a_child_of_an_index_tells_which_manifest_it_attests(text):
    annotations = {"vnd.docker.reference.digest": text}
    child = {"digest": digest_of(b"attestation"), "annotations": annotations}
    (parsed,) = parse({"manifests": [child]}, OCI_INDEX).children
    assert parsed.attested == (Digest.parse(text) if len(text) > 9 else None)
