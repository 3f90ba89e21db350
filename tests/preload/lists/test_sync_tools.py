"""The lists of skopeo sync, regsync and zot."""

from proxy.preload.lists import parse_list
from tests.support.image_lists import errors, images, only, platforms

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


def test_skopeo_entries_that_need_the_tag_list_are_errors_and_the_others_are_read():
    messages = dict(errors(SKOPEO))
    assert list(messages) == [7, 12, 13, 15, 17, 22]
    assert "selects every tag" in messages[7]
    assert "by a pattern" in messages[15]
    assert "by a pattern" in messages[17]


def test_no_secret_of_a_list_appears_in_the_result():
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


def test_regsync_images_are_read_and_targets_ignored():
    assert parse_list(REGSYNC).format == "regsync"
    assert platforms(REGSYNC) == {
        "busybox:latest": ("linux/amd64",),
        "ghcr.io/shop/app:1.4": ("linux/amd64", "linux/arm64"),
    }
    messages = dict(errors(REGSYNC))
    assert list(messages) == [14, 17, 19, 20]
    assert "by a pattern" in messages[14]
    assert "whole registry" in messages[17]
    assert "template" in messages[20]


def test_zot_rules_are_errors_because_they_are_patterns():
    text = """\
    {"extensions": {"sync": {"registries": [
      {"urls": ["https://docker.io"], "content": [
        {"prefix": "library/alpine", "tags": {"regex": "^3"}}, "odd"]},
      "odd"
    ]}}}
    """
    assert parse_list(text).format == "zot sync"
    assert [line for line, _ in errors(text)] == [3, 3]
    assert "'library/alpine' selects tags by a pattern" in errors(text)[0][1]
    line, _ = only(errors("registries:\n- content:\n  - prefix: a\n"))
    assert line == 3
