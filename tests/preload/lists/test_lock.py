"""Lock files: each image with its digest."""

import json

import pytest

from proxy.preload.lists import parse_list
from tests.support.image_lists import errors, images, platforms

DIGEST = "sha256:" + "a" * 64


def lock(*entries: object, version: object = 1) -> str:
    return json.dumps({"pullcache-lock": version, "images": entries}, indent=2)


def test_an_image_is_read_with_its_digest():
    text = lock(
        {"image": "docker.io/library/app:v1", "digest": DIGEST, "size": 1, "platforms": ["all"]},
        {"image": f"docker.io/me/app@{DIGEST}", "digest": DIGEST, "platforms": []},
    )
    assert parse_list(text).format == "pullcache lock"
    assert platforms(text) == {
        f"docker.io/library/app:v1@{DIGEST}": ("all",),
        f"docker.io/me/app@{DIGEST}": (),
    }
    assert errors(text) == []


@pytest.mark.parametrize("entry", ["text", {"image": "app"}, {"digest": DIGEST}])
def test_an_incomplete_entry_is_an_error_with_its_line(entry):
    text = lock(entry, {"image": "app:v1", "digest": DIGEST})
    assert errors(text) == [(4, "an image in a lock file needs image and digest")]
    assert len(images(text)) == 1


def test_another_version_of_the_lock_file_is_an_error():
    text = lock({"image": "app:v1", "digest": DIGEST}, version=2)
    assert errors(text) == [
        (1, "lock file version '2' is not supported: this pullcache supports 1")
    ]
    assert images(text) == []
