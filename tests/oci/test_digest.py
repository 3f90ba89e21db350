"""Digests: only what the specification allows parses, so nothing else gets into a path."""

import hashlib
import re

import pytest
from hypothesis import given, strategies as st

from proxy.errors import InvalidDigestError
from proxy.oci.digest import Digest

algorithms = st.sampled_from(["sha256", "sha512"])


@given(st.binary(), algorithms)
def test_the_text_of_a_digest_parses_to_the_same_digest(content, algorithm):
    digest = Digest.from_content(content, algorithm)
    assert Digest.parse(str(digest)) == digest
    assert digest.hex == hashlib.new(algorithm, content).hexdigest()
    assert digest.algorithm == algorithm


@given(st.lists(st.binary()), algorithms)
def test_hashing_in_chunks_results_in_the_digest_of_the_whole(chunks, algorithm):
    digest = Digest.from_content(b"".join(chunks), algorithm)
    hasher = digest.new_hasher()
    for chunk in chunks:
        hasher.update(chunk)
    assert digest.matches(hasher)
    hasher.update(b"more")
    assert not digest.matches(hasher)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "A" * 64,
        "SHA256:" + "a" * 64,
        "sha256:" + "g" * 64,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 128,
        "sha999:" + "a" * 64,
        "md5:" + "a" * 32,
        "sha256:../../../../etc/passwd",
        "sha256:" + "a" * 63 + "\0",
        "sha256:" + "a" * 64 + "\n",
        "sha256:" + "a" * 31 + "/" + "a" * 32,
        "sha256:" + "\u0661" * 64,
        " sha256:" + "a" * 64,
        "sha256:" + "a" * 64 + ",sha256:" + "b" * 64,
    ],
)
def test_an_invalid_digest_is_rejected(text):
    with pytest.raises(InvalidDigestError, match="is not a digest"):
        Digest.parse(text)


@given(st.text())
def test_every_digest_that_parses_is_safe_in_a_path(text):
    try:
        digest = Digest.parse(text)
    except InvalidDigestError as error:
        assert len(str(error)) <= 700  # noqa: PT017 - repr may escape 80 characters
    else:
        assert re.fullmatch(r"sha(256|512):[0-9a-f]+", str(digest))


@given(st.from_regex(r"(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128})", fullmatch=True))
def test_every_registered_digest_parses(text):
    assert str(Digest.parse(text)) == text


def test_the_error_of_a_short_digest_says_how_to_get_the_whole_one():
    with pytest.raises(InvalidDigestError, match="whole digests with --no-trunc"):
        Digest.parse("sha256:a2f937e5e425")
    with pytest.raises(InvalidDigestError, match="is not a digest") as caught:
        Digest.parse("sha256:nothex")
    assert "--no-trunc" not in str(caught.value)
