import json

import pytest

from proxy.errors import BundleError
from proxy.oci import layout
from proxy.oci.digest import Digest
from proxy.oci.layout import DockerImage, LayoutImage
from proxy.oci.manifest import OCI_INDEX, OCI_MANIFEST

A, B, C = (Digest.from_content(text) for text in (b"a", b"b", b"c"))


def test_what_is_written_is_read():
    images = [
        LayoutImage(A, 1, OCI_MANIFEST, "docker.io/library/a:1", "1"),
        LayoutImage(B, 2, OCI_INDEX, "docker.io/library/b:2", "2"),
        LayoutImage(C, 3, OCI_INDEX, f"docker.io/library/c@{C}"),
    ]
    assert layout.parse_index(layout.encode_index(images)) == images


def test_a_tag_that_two_images_have_is_written_in_full():
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


def test_what_is_meant_to_be_here_survives():
    meant = {A: [B, C], B: []}
    assert layout.parse_expected(layout.encode_expected(meant)) == meant
    with pytest.raises(BundleError):
        layout.parse_expected(b'{"manifests": {"sha256:0": []}}')


def test_docker_finds_blobs_where_the_layout_has_them():
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


def test_images_of_dockers_own_format_are_no_concern_of_a_layout():
    content = json.dumps([{"Config": f"{A.hex}.json", "RepoTags": None, "Layers": ["x/layer.tar"]}])
    assert layout.parse_docker_manifest(content.encode()) == {}


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_path_names_a_blob(algorithm):
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
def test_other_paths_name_none(path):
    assert layout.parse_blob_path(path) is None


def test_names_are_read_as_the_tools_write_them():
    def listed(**annotations: str) -> LayoutImage:
        keys = {"name": "io.containerd.image.name", "ref": "org.opencontainers.image.ref.name"}
        document = {
            "mediaType": OCI_MANIFEST,
            "digest": str(A),
            "size": 1,
            "annotations": {keys[key]: text for key, text in annotations.items()},
        }
        (image,) = layout.parse_index(json.dumps({"manifests": [document]}).encode())
        return image

    assert (listed().name, listed().tag) == ("", "")
    assert (listed(ref="v1").name, listed(ref="v1").tag) == ("", "v1")
    assert listed(ref="library/a:v1").name == "library/a:v1"
    assert listed(name="a:1", ref="quay.io/b:2").name == "a:1"


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
def test_an_index_that_is_none_is_refused(document):
    with pytest.raises(BundleError, match=r"document|what it should"):
        layout.parse_index(document)


def test_only_the_one_version_is_known():
    layout.check_layout(layout.LAYOUT_FILE_CONTENT)
    with pytest.raises(BundleError, match="2"):
        layout.check_layout(b'{"imageLayoutVersion": "2.0.0"}')
