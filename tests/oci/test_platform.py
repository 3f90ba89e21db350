"""Platforms are parsed and matched as containerd does it."""

import pytest

from proxy.errors import InvalidReferenceError
from proxy.oci.platform import (
    Platform,
    choose_platform,
    is_runnable,
    machine_platform,
    parse_platform,
)


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("Linux/x86_64", Platform("linux", "amd64")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/armhf", Platform("linux", "arm", "v7")),
        ("linux/armel/v5", Platform("linux", "arm", "v5")),
    ],
)
def test_a_platform_may_have_an_alias_of_its_architecture(text, platform):
    assert parse_platform(text) == platform


@pytest.mark.parametrize("text", ["", "linux", "amd64", "linux/", "a/b/c/d", "linux/amd 64", "/x"])
def test_an_invalid_platform_is_rejected(text):
    with pytest.raises(InvalidReferenceError, match="is not a platform: write it as"):
        parse_platform(text)


@pytest.mark.parametrize(
    ("machine", "platform"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("armv7l", "linux/arm/v7"),
        ("riscv64", "linux/riscv64"),
    ],
)
def test_the_output_of_uname_is_mapped_to_a_platform(machine, platform):
    assert str(machine_platform(machine)) == platform


@pytest.mark.parametrize(
    ("requested", "chosen"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", None),
        ("linux/arm64", "linux/arm64/v8"),
        ("linux/arm", "linux/arm/v6"),
        ("linux/arm/v7", "linux/arm/v6"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("linux/arm/v5", "linux/arm/v5"),
        ("linux/s390x", None),
        ("windows/amd64", None),
    ],
)
def test_the_best_match_is_chosen(requested, chosen):
    offered = ["linux/arm/v5", "linux/arm/v6", "linux/amd64", "linux/arm64/v8", "linux/amd64"]
    pairs = [(None, "nothing"), *((parse_platform(text), text) for text in offered)]
    assert choose_platform(pairs, parse_platform(requested)) == chosen


def test_of_equal_matches_the_first_is_chosen():
    assert (
        choose_platform(
            [(Platform("linux", "amd64"), 1), (Platform("linux", "amd64"), 2)],
            machine_platform("x86_64"),
        )
        == 1
    )


def test_attestations_are_not_runnable():
    assert not is_runnable(Platform("unknown", "unknown"))
    assert is_runnable(Platform("linux", "unknown"))
    assert is_runnable(None)
