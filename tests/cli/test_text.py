"""The text that commands print: sizes, durations, truncation, untrusted text."""

import pytest
from hypothesis import given, strategies as st

from proxy.cli.display.text import escape_unprintable, format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_600, "1 MB"),
        (50_000_000_000, "50 GB"),
        (1_500_000_000_000, "1.50 TB"),
        (1_234_000_000_000_000, "1234.00 TB"),
    ],
)
def test_a_size_has_three_digits_and_a_unit(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3_661, "1 h 1 min"),
        (86_400, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


def test_a_noun_is_plural_for_every_count_but_1():
    assert [format_count(count, "blob") for count in (0, 1, 2)] == ["0 blobs", "1 blob", "2 blobs"]


@given(st.text())
def test_unprintable_characters_are_escaped(text):
    assert escape_unprintable(text).isprintable()
    if text.isprintable():
        assert escape_unprintable(text) == text
