"""Platforms of a selection."""

import pytest

from proxy.errors import InvalidReferenceError
from proxy.images.selection import parse_platforms
from proxy.oci.platform import Platform


@pytest.mark.parametrize(
    ("texts", "platforms"),
    [
        (["linux/arm64", "linux/amd64"], [Platform("linux", "arm64"), Platform("linux", "amd64")]),
        (["all"], []),
        (["linux/arm64", "all"], []),
    ],
)
def test_all_selects_every_platform(texts, platforms):
    assert parse_platforms(texts) == platforms


def test_an_invalid_platform_is_an_error_even_beside_all():
    with pytest.raises(InvalidReferenceError, match="riscv"):
        parse_platforms(["all", "riscv"])
