"""Ranges and conditions against a reference model."""

import time

import pytest
from hypothesis import given, strategies as st

from proxy.server.ranges import (
    MAX_RANGES,
    ByteRange,
    RangeNotSatisfiableError,
    is_if_range_match,
    is_not_modified,
    parse_ranges,
)

ETAG = '"sha256:' + "a" * 64 + '"'
numbers = st.integers(0, 120)
specs = st.one_of(
    st.builds("{}-{}".format, numbers, numbers),
    st.builds("{}-".format, numbers),
    st.builds("-{}".format, numbers),
)


def model(spec: str, size: int) -> bytes | None:
    """Return the bytes that RFC 9110 section 14.1.2 selects of range(size); None: no such range."""
    content = bytes(range(size))
    first, _, last = spec.partition("-")
    if not first:
        return content[-int(last) :] if int(last) else b""
    if not last:
        return content[int(first) :]
    return content[int(first) : int(last) + 1] if int(first) <= int(last) else None


@given(specs, st.integers(0, 100))
def test_one_range_selects_what_the_model_selects(spec, size):
    content = bytes(range(size))
    expected = model(spec, size)
    if expected == b"":
        with pytest.raises(RangeNotSatisfiableError):
            parse_ranges(f"bytes={spec}", size)
        return
    selected = parse_ranges(f"bytes={spec}", size)
    if expected is None:
        assert not selected
    else:
        (one,) = selected
        assert content[one.start : one.stop] == expected
        assert one.length == len(expected)


@given(st.lists(specs, min_size=2, max_size=6), st.integers(0, 100))
def test_several_ranges_select_what_the_model_selects_for_each(asked, size):
    content = bytes(range(size))
    expected = [model(spec, size) for spec in asked]
    value = "bytes=" + " , ".join(asked)
    if None in expected:
        assert not parse_ranges(value, size)
        return
    present = [part for part in expected if part]
    if not present:
        with pytest.raises(RangeNotSatisfiableError):
            parse_ranges(value, size)
        return
    selected = parse_ranges(value, size)
    is_too_much = len(present) > 1 and sum(map(len, present)) > size
    assert [content[one.start : one.stop] for one in selected] == ([] if is_too_much else present)


def test_the_number_of_ranges_is_limited():
    def ranges(count: int) -> str:
        return "bytes=" + ",".join(f"{2 * n}-{2 * n}" for n in range(count))

    assert len(parse_ranges(ranges(MAX_RANGES), 1 << 20)) == MAX_RANGES
    assert parse_ranges(ranges(MAX_RANGES + 1), 1 << 20) == []


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=,,",
        "bytes=1-2;4-5",
        "bytes=0-90,0-90",
        "bytes=" + "0-0," * 1000,
        "bytes=--1",
        "bytes=+1-2",
        "bytes=1.5-2",
        "bytes=\u0661-\u0662",
        "lines=1-2",
        "bytes 1-2",
        "bytes=" + "9" * 30 + "-",
    ],
)
def test_ranges_that_may_be_ignored_are_ignored(value):
    assert parse_ranges(value, 100) == []


def test_empty_elements_of_the_list_are_ignored():
    """RFC 9110 section 5.6.1.2."""
    assert parse_ranges("bytes=,1-2,, ,4-5,", 100) == [ByteRange(1, 3), ByteRange(4, 6)]


def test_the_unit_is_case_insensitive_and_blanks_are_allowed():
    assert parse_ranges(" Bytes=1-2 ", 100) == [ByteRange(1, 3)]


@given(st.text() | specs.map("bytes={}".format), st.integers(0, 2**60))
def test_every_range_lies_inside_the_content(value, size):
    try:
        selected = parse_ranges(value, size)
    except RangeNotSatisfiableError:
        return
    assert all(0 <= one.start < one.stop <= size for one in selected)


@pytest.mark.parametrize(
    ("if_range", "current"),
    [
        (None, True),
        (ETAG, True),
        (f" {ETAG} ", True),
        (f"W/{ETAG}", False),
        (ETAG.strip('"'), False),
        ('"other"', False),
        ("Tue, 14 Nov 2023 22:14:20 GMT", False),
        ("", False),
    ],
)
def test_if_range_is_compared_strongly(if_range, current):
    assert is_if_range_match(if_range, ETAG) is current


@pytest.mark.parametrize(
    ("condition", "match"),
    [
        (None, False),
        ("", False),
        ("*", True),
        (ETAG, True),
        (f"W/{ETAG}", True),
        (ETAG.strip('"'), True),
        (f'"x", {ETAG}', True),
        (f'"x" ,W/"y",W/{ETAG} , "z"', True),
        ('"x", "y"', False),
        (f'"x{ETAG[1:]}', False),
        (ETAG[:-2] + '"', False),
    ],
)
def test_if_none_match_is_compared_weakly(condition, match):
    assert is_not_modified(condition, ETAG) is match


@given(st.text())
def test_no_condition_raises(value):
    is_not_modified(value, ETAG)
    is_if_range_match(value, ETAG)


@pytest.mark.parametrize(
    "value", ['"x", ' * 10_000 + ETAG, '"a"' + " " * 8_000 + "x", '"' * 60_000, "W/" * 30_000]
)
def test_a_long_condition_takes_little_time(value):
    start = time.process_time()
    is_not_modified(value, ETAG)
    assert time.process_time() - start < 0.2
