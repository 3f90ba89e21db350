"""The rules of the configuration, in order: the first that matches an image decides. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from proxy.config.dump import to_plain
from proxy.config.schema import PolicySettings
from proxy.globs import matches_any

# Repositories whose rule is remembered.
MAX_REMEMBERED_RULES = 4096


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One `[[policy]]` with its number, which counts from 1, as messages name it.

    `version` changes with the settings, so that a kept verdict of other settings is not used.
    """

    number: int
    settings: PolicySettings
    version: str

    @property
    def name(self) -> str:
        """The rule as messages name it: `policy 2 ("docker.io/*")`."""
        return f'policy {self.number} ("{self.settings.images[0]}")'


class RuleSet:
    """Finds the rule for an image."""

    def __init__(self, settings: Sequence[PolicySettings]) -> None:
        self.rules = [
            PolicyRule(number, one, _version(one)) for number, one in enumerate(settings, start=1)
        ]
        self.find = lru_cache(maxsize=MAX_REMEMBERED_RULES)(self._find)

    def _find(self, name: str) -> PolicyRule | None:
        """Return the first rule that matches `UPSTREAM/REPOSITORY`, None if no rule does."""
        return next((rule for rule in self.rules if _matches(rule.settings, name)), None)


def _matches(settings: PolicySettings, name: str) -> bool:
    return matches_any(name, settings.images) and not matches_any(name, settings.exclude)


def _version(settings: PolicySettings) -> str:
    """Return a hash of what decides; `mode` does not."""
    plain = to_plain(msgspec.structs.replace(settings, mode="audit"))
    return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()[:16]
