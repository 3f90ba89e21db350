"""Times of the admin API."""

from proxy.timestamps import to_seconds


def test_a_time_is_shown_as_the_second_that_it_is_in():
    assert to_seconds(1_700_000_000.9) == 1_700_000_000
    assert isinstance(to_seconds(1.0), int)
    assert to_seconds(None) is None
