"""Plain lists, written by hand or by k3s, RKE2, hauler and kubeadm."""

import pytest

from proxy.preload.lists import parse_list
from tests.support.image_lists import errors, images, only, platforms

KUBEADM = """\
registry.k8s.io/kube-apiserver:v1.31.2
registry.k8s.io/kube-controller-manager:v1.31.2
registry.k8s.io/coredns/coredns:v1.11.3
registry.k8s.io/pause:3.10
"""

MIXED = """
# what the build needs
nginx
docker.io/library/alpine:3.20   # a comment behind

  localhost:5000/team/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
# the end
"""


def test_each_line_is_an_image():
    image_list = parse_list(KUBEADM)
    assert image_list.format == "plain list"
    assert [entry.line for entry in image_list.entries] == [1, 2, 3, 4]
    assert image_list.entries[2].reference == "registry.k8s.io/coredns/coredns:v1.11.3"
    assert image_list.problems == ()


def test_comments_and_blank_lines_are_ignored_and_counted():
    digest = "0123456789abcdef" * 4
    assert images(MIXED) == [
        (3, "nginx"),
        (4, "docker.io/library/alpine:3.20"),
        (6, f"localhost:5000/team/app@sha256:{digest}"),
    ]


def test_a_duplicate_image_is_one_entry_at_its_first_line():
    assert images("b\na\nb\na\n") == [(1, "b"), (2, "a")]


def test_the_same_image_for_another_platform_is_another_entry():
    text = "a platform=linux/amd64\na platform=linux/arm64\na platform=linux/amd64\n"
    assert images(text) == [(1, "a"), (2, "a")]


@pytest.mark.parametrize(
    "line",
    [
        "nginx platform=linux/amd64,linux/arm/v7",
        "nginx platforms=linux/amd64,linux/arm/v7  # both",
        "nginx --platform linux/amd64,linux/arm/v7",
        "--platform=linux/amd64 nginx --platform=linux/arm/v7",
        "nginx platform=linux/amd64,linux/arm/v7,linux/amd64",
    ],
)
def test_an_image_may_name_its_platforms(line):
    assert platforms(line) == {"nginx": ("linux/amd64", "linux/arm/v7")}


@pytest.mark.parametrize("option", ["platform=amd64", "platform=", "platform", "platform=linux/"])
def test_an_invalid_platform_is_an_error(option):
    assert only(errors(f"alpine\nnginx {option}"))[0] == 2


def test_bad_lines_are_errors_and_the_others_are_read():
    text = "nginx\nNGINX\ntwo images\nalpine\ndocker://redis\nplatform=linux/amd64\n"
    assert images(text) == [(1, "nginx"), (4, "alpine")]
    messages = dict(errors(text))
    assert list(messages) == [2, 3, 5, 6]
    assert "put each image on its own line" in messages[3]


@pytest.mark.parametrize("line", ["a" * 2000, "\x01" * 80, "a:" + "\U000e0001" * 80])
def test_an_error_message_is_short_and_printable_for_any_line(line):
    message = only(errors(line))[1]
    assert len(message) < 200
    assert message.isprintable()


def test_windows_line_ends_and_a_byte_order_mark_are_accepted():
    assert images("\ufeffnginx\r\n\r\nalpine\r\n") == [(1, "nginx"), (3, "alpine")]
    assert images("nginx\ralpine\r") == [(1, "nginx"), (2, "alpine")]


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n", "\ufeff", " \t\r\n"])
def test_an_empty_list_is_an_error(text):
    assert errors(text) == [(1, "the list contains no images")]
    assert parse_list(text).format == ""


def test_a_plain_list_in_yaml_or_json_is_read():
    assert images("- nginx\n- alpine:3.20 # small\n") == [(1, "nginx"), (2, "alpine:3.20")]
    assert images('["nginx",\n "alpine"]') == [(1, "nginx"), (2, "alpine")]
    assert parse_list("- nginx").format == "YAML list"
    assert only(errors("- nginx\n- a: b\n"))[0] == 2
