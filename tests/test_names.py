"""Image names: which repository of which upstream a name means, and how it is displayed."""

import pytest
from hypothesis import given, strategies as st

from proxy.config import UpstreamSettings
from proxy.config.values import RegistryUrl
from proxy.errors import DeniedError
from proxy.names import NameParser, check_allowed, display_name
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag, parse_image

HUB = UpstreamSettings(url=RegistryUrl("https://hub.example"), deny=("me/secret",))
OTHER = UpstreamSettings(url=RegistryUrl("https://other.example"))
NAMES = NameParser({"docker.io": HUB, "ghcr.io": OTHER, "internal": OTHER, "localhost:5000": OTHER})
DIGEST = Digest.from_content(b"")


@pytest.mark.parametrize(
    ("text", "upstream", "name", "reference"),
    [
        ("nginx", "docker.io", "library/nginx", Tag("latest")),
        ("library/nginx:1", "docker.io", "library/nginx", Tag("1")),
        ("docker.io/nginx", "docker.io", "library/nginx", Tag("latest")),
        ("index.docker.io/me/app", "docker.io", "me/app", Tag("latest")),
        ("ghcr.io/app:1", "ghcr.io", "app", Tag("1")),
        ("ghcr.io/docker.io/app", "ghcr.io", "docker.io/app", Tag("latest")),
        ("internal/app", "internal", "app", Tag("latest")),
        ("localhost:5000/x:1", "localhost:5000", "x", Tag("1")),
        (f"nginx:1@{DIGEST}", "docker.io", "library/nginx", DIGEST),
    ],
)
def test_a_name_means_a_repository_and_a_reference(text, upstream, name, reference):
    assert NAMES.parse_allowed(text) == (Repository(upstream, name), reference)


@pytest.mark.parametrize("text", ["localhost:5001/x:1", "quay.io/me/app", "localhost/x"])
def test_a11_an_upstream_that_is_not_configured_is_refused_by_name(text):
    with pytest.raises(DeniedError, match=f"'{text.partition('/')[0]}' is not configured"):
        NAMES.parse_allowed(text)


@pytest.mark.parametrize(
    "text", ["docker.io/ghcr.io/me/app", "docker.io/docker.io/me/app", "docker.io/localhost/app"]
)
def test_a_name_at_docker_hub_that_begins_with_a_registry_is_refused(text):
    with pytest.raises(DeniedError, match="no repository"):
        NAMES.parse_allowed(text)


def test_a_denied_repository_is_refused():
    with pytest.raises(DeniedError, match="does not allow me/secret"):
        NAMES.parse_allowed("me/secret:1")


@pytest.mark.parametrize(
    ("name", "allow", "deny", "is_allowed"),
    [
        ("library/nginx", ["*"], [], True),
        ("a/b/c", ["*"], [], True),
        ("library/nginx", ["library/*"], [], True),
        ("me/nginx", ["library/*"], [], False),
        ("me/nginx", ["library/*", "me/*"], [], True),
        ("library/nginx", ["*"], ["library/*"], False),
        ("library/nginx", ["*"], ["*/nginx"], False),
        ("library/nginx", [], [], False),
        ("library/nginx", ["Library/*"], [], False),
    ],
)
def test_globs_allow_and_deny_repositories(name, allow, deny, is_allowed):
    if is_allowed:
        check_allowed(name, allow=allow, deny=deny)
    else:
        with pytest.raises(DeniedError, match=name):
            check_allowed(name, allow=allow, deny=deny)


@pytest.mark.parametrize(
    ("upstream", "name", "text"),
    [
        ("docker.io", "library/nginx", "nginx"),
        ("docker.io", "library/a/b", "library/a/b"),
        ("docker.io", "me/app", "me/app"),
        ("docker.io", "a.b/app", "docker.io/a.b/app"),
        ("ghcr.io", "library/nginx", "ghcr.io/library/nginx"),
    ],
)
def test_names_are_displayed_as_people_write_them(upstream, name, text):
    repository = Repository(upstream, name)
    assert display_name(repository) == text
    assert display_name(repository, Tag("1.25")) == f"{text}:1.25"
    assert display_name(repository, DIGEST) == f"{text}@{DIGEST}"


paths = st.lists(st.sampled_from(["library", "a", "b.c", "docker.io", "x"]), min_size=1).map(
    "/".join
)


@given(st.sampled_from(["docker.io", "ghcr.io", "quay.io"]), paths, st.sampled_from(["1", DIGEST]))
def test_a_displayed_name_means_the_same_repository(upstream, path, reference):
    known = NameParser({"docker.io": HUB, "ghcr.io": OTHER, "quay.io": OTHER})
    reference = Tag(reference) if isinstance(reference, str) else reference
    repository = NameParser({}).to_repository(parse_image(f"{upstream}/{path}"))[0]
    image = parse_image(display_name(repository, reference))
    assert known.to_repository(image) == (repository, reference)
