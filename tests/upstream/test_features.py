"""What a registry was found able and unable to do, for how long, and where."""

from proxy.upstream.features import (
    FEATURE_TTL,
    MAX_REPOSITORIES,
    UNCERTAIN_TTL,
    MissingFeature,
    RegistryFeatures,
)
from tests.fakes.clock import Clock


def test_a_missing_feature_is_remembered_for_its_repository_until_its_time_is_over():
    clock = Clock()
    features = RegistryFeatures(clock)
    assert not features.lacks("referrers", "me/app")
    assert features.record_missing("referrers", "me/app")
    assert not features.record_missing("referrers", "me/app")
    assert features.lacks("referrers", "me/app")
    assert not features.lacks("referrers", "me/other")
    assert not features.lacks("ranges", "me/app")
    clock.now += FEATURE_TTL["referrers"]
    assert not features.lacks("referrers", "me/app")
    assert features.missing() == []


def test_what_may_be_temporary_is_remembered_for_a_minute():
    clock = Clock()
    features = RegistryFeatures(clock)
    features.record_missing("manifest_head", "me/app", is_certain=False)
    clock.now += UNCERTAIN_TTL - 1
    assert features.lacks("manifest_head", "me/app")
    clock.now += 1
    assert not features.lacks("manifest_head", "me/app")


def test_a_feature_that_works_is_no_longer_missing():
    features = RegistryFeatures(Clock())
    features.record_missing("ranges", "me/app")
    assert not features.has("ranges", "me/app")
    features.record_present("ranges", "me/app")
    assert features.has("ranges", "me/app")
    assert not features.lacks("ranges", "me/app")
    assert not features.has("ranges", "me/other")


def test_a_clock_that_was_set_back_makes_findings_void():
    clock = Clock()
    features = RegistryFeatures(clock)
    features.record_missing("ranges", "me/app")
    clock.now -= 1
    assert not features.lacks("ranges", "me/app")


def test_the_missing_features_are_listed_with_the_first_time_at_which_one_is_tried_again():
    clock = Clock()
    features = RegistryFeatures(clock)
    features.record_missing("referrers", "me/app")
    retry_at = clock.now + FEATURE_TTL["referrers"]
    clock.now += 10
    features.record_missing("referrers", "me/other")
    features.record_present("ranges", "me/app")
    assert features.missing() == [MissingFeature("referrers", 2, retry_at)]


def test_repositories_are_remembered_up_to_a_bound():
    features = RegistryFeatures(Clock())
    for number in range(MAX_REPOSITORIES + 1):
        features.record_missing("ranges", f"me/{number}")
    assert not features.lacks("ranges", "me/0")
    assert features.lacks("ranges", "me/1")
