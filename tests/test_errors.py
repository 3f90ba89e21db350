"""The table of errors: every class has a row, and what the server and the commands make of it."""

import pytest

from proxy import errors
from proxy.cli.exit_codes import exit_code
from proxy.errors import OUTCOMES, ProxyError, error_code, error_from_code, error_outcome
from proxy.server.admin.handler import api_error_response
from proxy.server.errors import oci_error_response

# Those that the distribution specification registers ("Error Codes"), and Docker's two.
CODES = {
    *("BLOB_UNKNOWN", "DENIED", "DIGEST_INVALID", "MANIFEST_INVALID", "MANIFEST_UNKNOWN"),
    *("NAME_INVALID", "NAME_UNKNOWN", "TAG_INVALID", "TOOMANYREQUESTS", "UNAUTHORIZED"),
    *("UNSUPPORTED", "UNKNOWN", "UNAVAILABLE"),
}


def classes() -> list[type[ProxyError]]:
    found = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ProxyError)
    ]
    assert len(found) > 25
    return found


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_class_has_a_row_and_becomes_a_response(kind):
    outcome = OUTCOMES[kind]
    assert outcome.code in CODES
    error = kind("what happened")
    for request_kind in ("blob", "manifest", "other"):
        response = oci_error_response(error, request_kind)
        assert 400 <= response.status < 600
        assert isinstance(response.body, bytes)
        assert b"what happened" in response.body
    assert api_error_response(error).status == outcome.admin_status
    assert exit_code(error) == outcome.exit_code > 0
    assert type(error_from_code(error_code(error), "x")) is kind


def test_a_class_without_a_row_has_that_of_the_class_above_it():
    class SpecialError(errors.UnknownBlobError):
        pass

    assert error_outcome(SpecialError("x")) == OUTCOMES[errors.UnknownBlobError]


def test_a_blob_that_cannot_be_fetched_is_never_a_server_error():
    for kind in classes():
        assert oci_error_response(kind("x"), "blob").status < 500
