"""The documents of an image layout: what is written is read, and what tools write is understood."""

import json

import pytest

from proxy.errors import BundleError
from proxy.oci import layout
from proxy.oci.digest import Digest
from proxy.oci.layout import DockerImage, LayoutImage
from proxy.oci.manifest import OCI_INDEX, OCI_MANIFEST
from proxy.oci.referrers import ReferrerRecord

A, B, C = (Digest.from_content(text) for text in (b"a", b"b", b"c"))


def test_an_index_round_trips():
    images = [
        LayoutImage(A, 1, OCI_MANIFEST, "docker.io/library/a:1", "1"),
        LayoutImage(B, 2, OCI_INDEX, "docker.io/library/b:2", "2"),
        LayoutImage(C, 3, OCI_INDEX, f"docker.io/library/c@{C}"),
    ]
    assert layout.parse_index(layout.encode_index(images)) == images


def test_images_with_the_same_tag_are_named_in_full():
    images = [
        LayoutImage(A, 1, OCI_MANIFEST, "docker.io/library/a:1", "1"),
        LayoutImage(B, 1, OCI_MANIFEST, "docker.io/library/b:1", "1"),
    ]
    written = json.loads(layout.encode_index(images))["manifests"]
    key = "org.opencontainers.image.ref.name"
    assert [one["annotations"][key] for one in written] == [image.name for image in images]
    assert [one.name for one in layout.parse_index(layout.encode_index(images))] == [
        image.name for image in images
    ]


def test_the_expected_manifests_round_trip():
    expected = {A: [B, C], B: []}
    assert (
        layout.parse_details(layout.encode_details(layout.BundleDetails(expected))).manifests
        == expected
    )
    with pytest.raises(BundleError):
        layout.parse_details(b'{"manifests": {"sha256:0": []}}')


def test_what_the_registry_had_of_referrers_round_trips_and_version_0_1_0_reads_the_rest():
    records = {"docker.io/library/a": {A: ReferrerRecord([], [])}}
    content = layout.encode_details(layout.BundleDetails(records=records))
    assert layout.parse_details(content).records == records
    assert json.loads(content)["manifests"] == {}  # required there
    assert layout.encode_details(layout.BundleDetails()) == b""


def test_docker_s_manifest_refers_to_the_blobs_of_the_layout():
    image = DockerImage(A, (B, C), ("docker.io/library/a:1",))
    written = layout.encode_docker_manifest([image])
    assert json.loads(written) == [
        {
            "Config": f"blobs/sha256/{A.hex}",
            "RepoTags": ["docker.io/library/a:1"],
            "Layers": [f"blobs/sha256/{B.hex}", f"blobs/sha256/{C.hex}"],
        }
    ]
    assert layout.parse_docker_manifest(written) == {A: ["docker.io/library/a:1"]}


def test_images_in_docker_s_old_format_are_left_out():
    content = json.dumps([{"Config": f"{A.hex}.json", "RepoTags": None, "Layers": ["x/layer.tar"]}])
    assert layout.parse_docker_manifest(content.encode()) == {}


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_path_of_a_blob_round_trips(algorithm):
    digest = Digest.from_content(b"x", algorithm)
    assert layout.parse_blob_path(layout.blob_path(digest)) == digest


@pytest.mark.parametrize(
    "path",
    [
        "index.json",
        f"blobs/sha256/{A.hex}/x",
        f"x/blobs/sha256/{A.hex}",
        f"blobs/sha256/{A.hex[:-1]}",
        f"blobs/sha512/{A.hex}",
        f"blobs/md5/{A.hex}",
        f"blobs/sha256/{A.hex.upper()}",
        f"blobs/sha256/{A.hex}\n",
    ],
)
def test_any_other_path_is_not_that_of_a_blob(path):
    assert layout.parse_blob_path(path) is None


def test_names_are_understood_as_each_tool_writes_them():
    def parsed(**annotations: str) -> LayoutImage:
        keys = {"name": "io.containerd.image.name", "ref": "org.opencontainers.image.ref.name"}
        document = {
            "mediaType": OCI_MANIFEST,
            "digest": str(A),
            "size": 1,
            "annotations": {keys[key]: text for key, text in annotations.items()},
        }
        (image,) = layout.parse_index(json.dumps({"manifests": [document]}).encode())
        return image

    assert (parsed().name, parsed().tag) == ("", "")
    assert (parsed(ref="v1").name, parsed(ref="v1").tag) == ("", "v1")
    assert parsed(ref="library/a:v1").name == "library/a:v1"
    assert parsed(name="a:1", ref="quay.io/b:2").name == "a:1"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b'{"manifests": 1}',
        b'{"manifests": [{}]}',
        b'{"manifests": [{"mediaType": "a", "digest": "sha256:0", "size": 1}]}',
        b"[" * 200_000,
    ],
    ids=range(6),
)
def test_an_invalid_index_is_rejected(document):
    with pytest.raises(BundleError, match=r"malformed digest|is invalid"):
        layout.parse_index(document)


def test_a_layout_of_another_version_is_rejected():
    layout.check_layout(layout.LAYOUT_FILE_CONTENT)
    with pytest.raises(BundleError, match="2"):
        layout.check_layout(b'{"imageLayoutVersion": "2.0.0"}')
