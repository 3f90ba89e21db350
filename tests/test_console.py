"""Requests as the log shows them at a console."""

import pytest

from proxy.console import describe_target, format_admin_request, format_request
from tests.fakes.content import digest_of

DIGEST = digest_of(b"a layer")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v2/library/nginx/manifests/1.27", "nginx:1.27"),
        ("/v2/library/nginx/manifests/1.27?ns=docker.io", "nginx:1.27"),
        ("/v2/ghcr.io/me/app/manifests/v1", "ghcr.io/me/app:v1"),
        (f"/v2/me/app/blobs/{DIGEST}", f"me/app@{DIGEST[:19]}"),
        (f"/v2/me/app/blobs/{DIGEST.replace(':', '%3A')}", f"me/app@{DIGEST[:19]}"),
        (f"/v2/me/app/manifests/{DIGEST}", f"me/app@{DIGEST[:19]}"),
        (f"/v2/me/app/referrers/{DIGEST}", f"me/app@{DIGEST[:19]} referrers"),
        ("/v2/", "/v2/"),
        ("/v2/me/app/tags/list", "/v2/me/app/tags/list"),
    ],
)
def test_a_path_is_shown_as_the_image_that_it_is_about(path, shown):
    assert describe_target(path) == shown


REQUEST = {
    "method": "GET",
    "path": "/v2/library/nginx/manifests/1.27",
    "status": 200,
    "cache": "miss",
    "bytes": 5_300_000,
    "seconds": 0.412345,
}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "GET nginx:1.27 miss 5.3 MB 0.412 s"),
        ({"path": "/v2/", "cache": "none"}, "GET /v2/ 200 5.3 MB 0.412 s"),
        ({"seconds": 0.00028}, "GET nginx:1.27 miss 5.3 MB 0.000 s"),
        (
            {"status": 404, "bytes": 0, "problem": "unknown"},
            "GET nginx:1.27 404 0 B 0.412 s: unknown",
        ),
    ],
)
def test_a_request_is_verb_image_result_bytes_and_seconds(fields, line):
    assert format_request(REQUEST | fields) == line


def test_a_request_to_the_admin_api_is_verb_path_status_and_actor():
    fields = {"method": "GET", "path": "/api/v1/images?filter=", "status": 200}
    assert format_admin_request(fields) == "GET /api/v1/images 200 by -"
    fields["actor"] = "uid 0 pid 7"
    assert format_admin_request(fields) == "GET /api/v1/images 200 by uid 0 pid 7"
