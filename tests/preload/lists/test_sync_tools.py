"""The lists of skopeo sync, regsync and zot."""

from proxy.preload.lists import parse_list
from tests.support.image_lists import images, only, platforms, problems

DIGEST = "sha256:" + "0123456789abcdef" * 4

SKOPEO = f"""\
registry.shop.example:5000:
  tls-verify: false
  credentials:
    username: john
    password: secret
  images:
    busybox: []
    shop/redis:
      - "1.0"
      - 2.10
      - {DIGEST}
      - [odd]
    shop/all:
  images-by-tag-regex:
    nginx: ^1\\.13\\.[12]-alpine-perl$
  images-by-semver:
    alpine: ">= 3.12.0"
quay.io:
  images:
    coreos/etcd:
      - latest
odd: text
"""


def test_skopeo_images_are_named_with_their_registry():
    assert parse_list(SKOPEO).format == "skopeo sync"
    assert images(SKOPEO) == [
        (9, "registry.shop.example:5000/shop/redis:1.0"),
        (10, "registry.shop.example:5000/shop/redis:2.10"),
        (11, f"registry.shop.example:5000/shop/redis@{DIGEST}"),
        (21, "quay.io/coreos/etcd:latest"),
    ]


def test_what_needs_the_registrys_tags_is_named_and_the_rest_goes_on():
    found = dict(problems(SKOPEO))
    assert list(found) == [7, 12, 13, 15, 17, 22]
    assert "selects every tag" in found[7]
    assert "by a pattern" in found[15]
    assert "by a pattern" in found[17]


def test_no_secret_of_a_list_is_repeated():
    assert "secret" not in str(parse_list(SKOPEO))


REGSYNC = """\
version: 1
creds:
  - registry: ghcr.io
defaults:
  ratelimit: {min: 100}
sync:
  - source: busybox:latest
    target: registry.shop.example/busybox:latest
    type: image
    platform: linux/amd64
  - source: ghcr.io/shop/app:1.4
    type: image
    platforms: [linux/amd64, linux/arm64]
  - source: alpine
    type: repository
    tags: {allow: ["3", "3.\\\\d+"]}
  - source: registry.shop.example
    type: registry
  - text
  - source: '{{ env "IMAGE" }}'
    type: image
"""


def test_regsync_images_are_read_and_targets_left_alone():
    assert parse_list(REGSYNC).format == "regsync"
    assert platforms(REGSYNC) == {
        "busybox:latest": ("linux/amd64",),
        "ghcr.io/shop/app:1.4": ("linux/amd64", "linux/arm64"),
    }
    found = problems(REGSYNC)
    assert [line for line, _ in found] == [14, 17, 19, 20]
    assert "by a pattern" in found[0][1]
    assert "whole registry" in found[1][1]
    assert "template" in found[3][1]


def test_zot_sync_is_known_and_said_not_to_be_enough():
    text = """\
    {"extensions": {"sync": {"registries": [
      {"urls": ["https://docker.io"], "content": [
        {"prefix": "library/alpine", "tags": {"regex": "^3"}}, "odd"]},
      "odd"
    ]}}}
    """
    assert parse_list(text).format == "zot sync"
    assert [line for line, _ in problems(text)] == [3, 3]
    assert "'library/alpine' selects tags by a pattern" in problems(text)[0][1]
    line, _ = only(problems("registries:\n- content:\n  - prefix: a\n"))
    assert line == 3
