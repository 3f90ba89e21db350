"""Plain lists, as people write them and as k3s, RKE2, hauler and kubeadm do."""

import pytest

from proxy.preload.lists import parse_list
from tests.support.image_lists import images, only, platforms, problems

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


def test_a_line_is_an_image():
    found = parse_list(KUBEADM)
    assert found.format == "plain list"
    assert [entry.line for entry in found.entries] == [1, 2, 3, 4]
    assert found.entries[2].reference == "registry.k8s.io/coredns/coredns:v1.11.3"
    assert found.problems == ()


def test_comments_and_blank_lines_are_passed_over_and_lines_still_right():
    digest = "0123456789abcdef" * 4
    assert images(MIXED) == [
        (3, "nginx"),
        (4, "docker.io/library/alpine:3.20"),
        (6, f"localhost:5000/team/app@sha256:{digest}"),
    ]


def test_an_image_that_stands_twice_is_one_where_it_stood_first():
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
def test_what_is_no_platform_is_named(option):
    assert only(problems(f"alpine\nnginx {option}"))[0] == 2


def test_bad_lines_are_named_and_the_rest_goes_on():
    text = "nginx\nNGINX\ntwo images\nalpine\ndocker://redis\nplatform=linux/amd64\n"
    assert images(text) == [(1, "nginx"), (4, "alpine")]
    found = problems(text)
    assert [line for line, _ in found] == [2, 3, 5, 6]
    assert "put each image on its own line" in found[1][1]


@pytest.mark.parametrize("line", ["a" * 2000, "\x01" * 80, "a:" + "\U000e0001" * 80])
def test_what_is_said_of_a_line_is_short_whatever_stands_there(line):
    message = only(problems(line))[1]
    assert len(message) < 200
    assert message.isprintable()


def test_windows_line_ends_and_a_byte_order_mark_change_nothing():
    assert images("\ufeffnginx\r\n\r\nalpine\r\n") == [(1, "nginx"), (3, "alpine")]
    assert images("nginx\ralpine\r") == [(1, "nginx"), (2, "alpine")]


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n", "\ufeff", " \t\r\n"])
def test_an_empty_list_is_said_to_be_empty(text):
    assert problems(text) == [(1, "the list names no image")]
    assert parse_list(text).format == ""


def test_a_list_in_yaml_or_json_is_a_list_too():
    assert images("- nginx\n- alpine:3.20 # small\n") == [(1, "nginx"), (2, "alpine:3.20")]
    assert images('["nginx",\n "alpine"]') == [(1, "nginx"), (2, "alpine")]
    assert parse_list("- nginx").format == "YAML list"
    assert only(problems("- nginx\n- a: b\n"))[0] == 2
