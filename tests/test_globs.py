from fnmatch import fnmatchcase

from hypothesis import given, strategies as st

from proxy.globs import can_match_with_prefix, covers

GLOBS = st.text(alphabet="ab/*?", max_size=6)
TEXTS = st.text(alphabet="ab/", max_size=6)


@given(glob=GLOBS, other=GLOBS, text=TEXTS)
def test_what_a_covered_glob_matches_the_covering_one_matches(glob: str, other: str, text: str):
    if covers(glob, other) and fnmatchcase(text, other):
        assert fnmatchcase(text, glob)


@given(glob=GLOBS, prefix=TEXTS, rest=TEXTS)
def test_a_match_with_a_prefix_is_possible_if_there_is_one(glob: str, prefix: str, rest: str):
    if fnmatchcase(prefix + rest, glob):
        assert can_match_with_prefix(glob, prefix)


def test_a_glob_without_a_registry_matches_no_image_of_one():
    assert not can_match_with_prefix("nginx", "docker.io/")
    assert not can_match_with_prefix("ghcr.io/*", "docker.io/")
    assert can_match_with_prefix("*", "docker.io/")
    assert can_match_with_prefix("[dg]ocker.??/library/*", "docker.io/")
    assert not can_match_with_prefix("[!d]*", "docker.io/")
