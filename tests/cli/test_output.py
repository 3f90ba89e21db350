"""How the commands write sizes, and names that came from outside."""

import pytest
from hypothesis import given, strategies as st

from proxy.cli.display.text import escape_unprintable, format_bytes


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


@given(st.text())
def test_what_is_printed_holds_no_control_character(text):
    assert escape_unprintable(text).isprintable()
    if text.isprintable():
        assert escape_unprintable(text) == text
