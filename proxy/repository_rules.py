"""Rules by repository: how long tags are fresh, what is prefetched, and how long and how much is kept. Pure.

For each key the first rule that matches the repository and sets the key decides; without one, the
key of the whole cache does.
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

import msgspec

from proxy.config import Config, RuleSettings
from proxy.globs import matches_any
from proxy.oci.reference import Tag
from proxy.oci.referrers import subject_of_tag

# Repositories, and tags, whose settings are remembered.
MAX_REMEMBERED_REPOSITORIES = 4096
MAX_REMEMBERED_TAGS = 4096

NEVER = math.inf
"""The TTL of a tag that upstream is not asked about again."""

DEFAULT_RULE = 0
"""Stands for the number of a rule where no rule sets a key."""


class TagTtl(NamedTuple):
    """The seconds for which a tag is fresh, and where they come from: `rules[2].tag_ttl "v*"`."""

    seconds: float
    source: str


class RepositorySettings(msgspec.Struct, frozen=True):
    """What applies to one repository. `sources` are the numbers of the rules that set the keys.

    Durations are in seconds. `max_share` is the share of the store beyond which content of the rule goes
    first, None without a limit.
    """

    ttl: float
    tag_ttl: Mapping[str, float]
    immutable: tuple[str, ...]
    max_idle: float
    max_share: float | None
    prefetches: bool
    sources: Mapping[str, int]


class RepositoryRules:
    """The rules of a configuration. Repositories are named `docker.io/library/nginx`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.settings = lru_cache(maxsize=MAX_REMEMBERED_REPOSITORIES)(self._find_settings)
        self._find_ttl = lru_cache(maxsize=MAX_REMEMBERED_TAGS)(self.tag_ttl)
        self.max_shares = {
            number: rule.max_share.fraction
            for number, rule in enumerate(config.rules, 1)
            if rule.max_share
        }
        """The shares of the store by the numbers of the rules that set one."""
        self.max_idles = {
            DEFAULT_RULE: float(config.store.max_idle),
            **{
                number: rule.max_idle.seconds
                for number, rule in enumerate(config.rules, 1)
                if rule.max_idle
            },
        }
        """Idle times in seconds by rule number, with `DEFAULT_RULE` for the whole cache; 0 means never."""

    @property
    def has_prefetch(self) -> bool:
        """Whether anything is prefetched."""
        modes = [self._config.fetch.prefetch, *(rule.prefetch for rule in self._config.rules)]
        return "layers" in modes

    def globs(self, rule: int) -> tuple[str, ...]:
        """Return the globs of the rule with this number."""
        return self._config.rules[rule - 1].images

    def quotas(self, max_size: int) -> dict[int, int]:
        """Return the shares of a store of `max_size` bytes, in bytes, by the numbers of their rules."""
        return {number: int(share * max_size) for number, share in self.max_shares.items()}

    def quota_rule(self, name: str) -> int:
        """Return the number of the rule that sets the share of a repository, 0 without one."""
        return self.settings(name).sources["max_share"]

    def idle_rule(self, name: str) -> int:
        """Return the number of the rule that sets the idle time of a repository, 0 without one."""
        return self.settings(name).sources["max_idle"]

    def ttl(self, name: str, tag: str) -> float:
        """Return the seconds for which a tag is fresh, `NEVER` if it is immutable."""
        return self._find_ttl(name, tag).seconds

    def tag_ttl(self, name: str, tag: str) -> TagTtl:
        """Return the seconds for which a tag is fresh, and where they come from."""
        settings = self.settings(name)
        # Tags for referrers move with each new signature.
        for glob in () if subject_of_tag(Tag(tag)) else settings.immutable:
            if fnmatchcase(tag, glob):
                return TagTtl(NEVER, f'{self._source(settings, "immutable")} "{glob}"')
        for glob, seconds in settings.tag_ttl.items():
            if fnmatchcase(tag, glob):
                return TagTtl(seconds, f'{self._source(settings, "tag_ttl")} "{glob}"')
        return TagTtl(settings.ttl, self._source(settings, "ttl"))

    def _source(self, settings: RepositorySettings, key: str) -> str:
        number = settings.sources[key]
        return f"rules[{number}].{key}" if number else f"manifests.{key}"

    def _find_settings(self, name: str) -> RepositorySettings:
        config, sources = self._config, dict[str, int]()
        matching = [
            (number, rule)
            for number, rule in enumerate(config.rules, 1)
            if matches_any(name, rule.images)
        ]

        def find(key: str) -> RuleSettings | None:
            for number, rule in matching:
                if getattr(rule, key):
                    sources[key] = number
                    return rule
            sources[key] = DEFAULT_RULE
            return None

        ttl, tag_ttl, idle = find("ttl"), find("tag_ttl"), find("max_idle")
        immutable, share, prefetch = find("immutable"), find("max_share"), find("prefetch")
        return RepositorySettings(
            ttl=ttl.ttl.seconds if ttl else float(config.manifests.ttl),
            tag_ttl=tag_ttl.tag_ttl if tag_ttl else config.manifests.tag_ttl,
            immutable=immutable.immutable if immutable else (),
            max_idle=idle.max_idle.seconds if idle else float(config.store.max_idle),
            max_share=share.max_share.fraction if share else None,
            prefetches=(prefetch.prefetch if prefetch else config.fetch.prefetch) == "layers",
            sources=sources,
        )
