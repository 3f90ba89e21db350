"""Lock files: each image by its digest."""

import json

import pytest

from proxy.preload.lists import parse_list
from tests.support.image_lists import images, platforms, problems

DIGEST = "sha256:" + "a" * 64


def lock(*entries: object, version: object = 1) -> str:
    return json.dumps({"pullcache-lock": version, "images": entries}, indent=2)


def test_an_image_is_meant_by_its_digest():
    text = lock(
        {"image": "docker.io/library/app:v1", "digest": DIGEST, "size": 1, "platforms": ["all"]},
        {"image": f"docker.io/me/app@{DIGEST}", "digest": DIGEST, "platforms": []},
    )
    assert parse_list(text).format == "pullcache lock"
    assert platforms(text) == {
        f"docker.io/library/app:v1@{DIGEST}": ("all",),
        f"docker.io/me/app@{DIGEST}": (),
    }
    assert problems(text) == []


@pytest.mark.parametrize("entry", ["text", {"image": "app"}, {"digest": DIGEST}])
def test_an_entry_that_is_none_is_named_by_its_line(entry):
    text = lock(entry, {"image": "app:v1", "digest": DIGEST})
    assert problems(text) == [(4, "an image in a lock file needs image and digest")]
    assert len(images(text)) == 1


def test_a_lock_of_another_version_is_not_guessed_at():
    text = lock({"image": "app:v1", "digest": DIGEST}, version=2)
    assert problems(text) == [
        (1, "lock file version '2' is not supported: this pullcache supports 1")
    ]
    assert images(text) == []
