"""Which media types an Accept header allows."""

import pytest
from hypothesis import given, strategies as st

from proxy.oci.accept import accepts
from proxy.oci.manifest import DOCKER_MANIFEST, OCI_ARTIFACT, OCI_INDEX, OCI_MANIFEST


@pytest.mark.parametrize(
    ("accept", "is_accepted"),
    [
        ([], True),
        ([""], True),
        (["*/*"], True),
        (["application/*"], True),
        ([OCI_INDEX], True),
        ([OCI_INDEX.upper()], True),
        ([f"{DOCKER_MANIFEST}, {OCI_INDEX};q=0.5"], True),
        ([DOCKER_MANIFEST, OCI_INDEX], True),
        ([f"{DOCKER_MANIFEST},*/*"], True),
        ([f" {OCI_INDEX} ; charset=utf-8 "], True),
        ([DOCKER_MANIFEST], False),
        ([OCI_MANIFEST, DOCKER_MANIFEST], False),
        (["text/html"], False),
        ([OCI_INDEX + "x"], False),
        (["*/*;q=0"], False),
        ([f"{OCI_INDEX};q=0.000"], False),
        ([f"{OCI_INDEX}; q=0"], False),
        (["x" * 8000], False),
    ],
)
def test_a_client_accepts_what_its_accept_lines_name(accept, is_accepted):
    assert accepts(accept, OCI_INDEX) is is_accepted


@pytest.mark.parametrize("media_type", [OCI_ARTIFACT, "application/vnd.example.manifest"])
def test_artifacts_are_not_negotiated(media_type):
    assert accepts([OCI_MANIFEST], media_type)


@given(st.lists(st.text()))
def test_no_accept_line_is_an_error(accept):
    accepts(accept, OCI_INDEX)
