"""What a registry was found able and unable to do, remembered for a while. Pure.

It is remembered per repository, as clients do: one registry may serve repositories of several kinds, and
what one repository lacks must not hide the signatures of another.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Feature = Literal["manifest_head", "blob_head", "ranges", "referrers"]

# Seconds for which a finding holds. Missing referrers as long as a tag is fresh by default, because a
# signature that is pushed meanwhile would not be found; HEAD longer, because its lack costs only requests.
FEATURE_TTL: Mapping[Feature, float] = {
    "manifest_head": 3600.0,
    "blob_head": 3600.0,
    "ranges": 3600.0,
    "referrers": 600.0,
}
# The same for a feature that is missing after a failure that may be temporary.
UNCERTAIN_TTL = 60.0
# Repositories that are remembered per feature.
MAX_REPOSITORIES = 1000


@dataclass(frozen=True, slots=True)
class MissingFeature:
    """A feature that `repositories` lack; the first of them is asked again at `retry_at` (Unix time)."""

    feature: Feature
    repositories: int
    retry_at: float


@dataclass(frozen=True, slots=True)
class _Finding:
    is_present: bool
    found_at: float
    ttl: float


class RegistryFeatures:
    """The findings about one registry. `clock` is Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._findings: dict[Feature, OrderedDict[str, _Finding]] = {
            feature: OrderedDict() for feature in FEATURE_TTL
        }

    def has(self, feature: Feature, repository: str) -> bool:
        """Tell whether the feature was recently seen to work in the repository."""
        finding = self._current_finding(feature, repository)
        return finding is not None and finding.is_present

    def lacks(self, feature: Feature, repository: str) -> bool:
        """Tell whether the feature was recently found to be missing in the repository."""
        finding = self._current_finding(feature, repository)
        return finding is not None and not finding.is_present

    def record_present(self, feature: Feature, repository: str) -> None:
        """Remember that the feature works."""
        self._record(feature, repository, is_present=True, ttl=FEATURE_TTL[feature])

    def record_missing(self, feature: Feature, repository: str, *, is_certain: bool = True) -> bool:
        """Remember that the feature is missing; return whether that is news."""
        is_news = not self.lacks(feature, repository)
        ttl = FEATURE_TTL[feature] if is_certain else UNCERTAIN_TTL
        self._record(feature, repository, is_present=False, ttl=ttl)
        return is_news

    def missing(self) -> list[MissingFeature]:
        """Return the features that are missing now."""
        ends: dict[Feature, list[float]] = {
            feature: [
                finding.found_at + finding.ttl
                for repository, finding in findings.items()
                if self.lacks(feature, repository)
            ]
            for feature, findings in self._findings.items()
        }
        return [
            MissingFeature(feature, len(times), min(times))
            for feature, times in ends.items()
            if times
        ]

    def _record(self, feature: Feature, repository: str, *, is_present: bool, ttl: float) -> None:
        findings = self._findings[feature]
        findings.pop(repository, None)
        findings[repository] = _Finding(is_present, self._clock(), ttl)
        if len(findings) > MAX_REPOSITORIES:
            findings.popitem(last=False)

    def _current_finding(self, feature: Feature, repository: str) -> _Finding | None:
        finding = self._findings[feature].get(repository)
        # A negative age means that the clock was set back.
        is_current = finding and 0 <= self._clock() - finding.found_at < finding.ttl
        return finding if is_current else None
