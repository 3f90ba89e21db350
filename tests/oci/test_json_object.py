"""Registries' JSON is decoded as leniently as clients decode it."""

from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

from proxy.oci.json_object import decode_object


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (b'{"tags":["a"]}', {"tags": ["a"]}),
        (b'{"Tags":["a"],"NAME":1}', {"tags": ["a"], "name": 1}),
        (b'{"tags":["a"],"Tags":["b"]}', {"tags": ["b"]}),
        (b'{"tags":["a"],"Tags":null}', {"tags": ["a"]}),
        (b'{"tags":null}', {"tags": None}),
        (b'{"a":{"B":null}}', {"a": {"B": None}}),
        (b'{"a":"\xff"}', {"a": "\ufffd"}),
        (b' \r\n{"a":1}\n{"a":2}', {"a": 1}),
        (b'{"a":1}<!-- cached -->', {"a": 1}),
        (b"null", {}),
        (b"{}", {}),
    ],
)
def test_an_object_is_decoded_as_in_go(content, fields):
    assert decode_object(content) == fields


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" ", b"[]", b'"a"', b"5", b"<html>", b"{", b'{"a":1', b'{"a":1,}'),
        *(
            b"[" * 100_000,
            b"{]" + b"[" * 100_000,
            b'\xef\xbb\xbf{"a":1}',
            b'{"a":\x00}',
            b'{"a":NaN}',
        ),
        *(b'{"a":' + b"9" * 10_000 + b"}x",),
    ],
)
def test_anything_else_is_a_value_error(content):
    with pytest.raises(ValueError):  # noqa: PT011
        decode_object(content)


@given(st.binary(max_size=60))
def test_no_content_raises_another_error(content):
    with suppress(ValueError):
        decode_object(content)
