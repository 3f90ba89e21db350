"""The tags by which clients find what refers to a manifest."""

import pytest
from hypothesis import given, strategies as st

from proxy.oci.digest import Digest
from proxy.oci.referrers import (
    ReferrerRecord,
    cosign_tags,
    fallback_tag,
    parse_descriptor_digest,
    parse_fallback_index,
    subject_of_tag,
)

SUBJECT = Digest.from_content(b"subject")


def test_the_fallback_tag_is_that_of_the_specification():
    assert fallback_tag(SUBJECT) == f"sha256-{SUBJECT.hex}"
    long = Digest.from_content(b"subject", "sha512")
    assert fallback_tag(long) == f"sha512-{long.hex[:64]}"


def test_a_tag_for_referrers_tells_its_subject():
    for tag in (fallback_tag(SUBJECT), *cosign_tags(SUBJECT)):
        assert subject_of_tag(tag) == SUBJECT


@pytest.mark.parametrize(
    "tag", ["latest", "sha256-", f"sha256-{SUBJECT.hex}0", f"sha256-{SUBJECT.hex.upper()}"]
)
def test_any_other_tag_has_no_subject(tag):
    assert subject_of_tag(tag) is None


@given(st.text())
def test_no_tag_makes_the_parser_raise(tag):
    assert subject_of_tag(tag) is None


def test_a_record_survives_encoding():
    record = ReferrerRecord([{"digest": "sha256:x", "size": 1.5, "\u00e4": None}], ["a", "b"])
    assert ReferrerRecord.decode(record.encode()) == record
    with pytest.raises(ValueError, match="not a record"):
        ReferrerRecord.decode("[]")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"manifests":null}', b"[" * 100_000])
def test_what_is_no_index_lists_no_referrers(content):
    assert parse_fallback_index(content) == []
    for name in (b"manifests", b"Manifests"):
        assert parse_fallback_index(b'{"%s":[{"a":1},null]}' % name) == [{"a": 1}]


def test_a_digest_that_cannot_be_read_is_none():
    assert parse_descriptor_digest({"digest": str(SUBJECT)}) == SUBJECT
    assert parse_descriptor_digest({"digest": None}) is None
    assert parse_descriptor_digest({}) is None
