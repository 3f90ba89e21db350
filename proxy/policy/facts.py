"""What can be known about an image when a policy judges it. Pure."""

from dataclasses import dataclass
from enum import StrEnum

# Docker Hub's namespace of official images, with the name of its upstream.
OFFICIAL_GLOB_PREFIX = "docker.io/library/"


class Badge(StrEnum):
    """What is known about the publisher of a repository.

    `OFFICIAL` is a fact of the name. `VERIFIED_PUBLISHER`, `SPONSORED` and `COMMUNITY` are what Docker
    Hub said at a time: a badge is lost when a contract ends. The others are no facts: Docker Hub's
    search does not list the repository, which proves nothing; it is private, and not asked about; it
    was not asked about yet; or Docker Hub did not answer.
    """

    OFFICIAL = "official"
    VERIFIED_PUBLISHER = "verified_publisher"
    SPONSORED = "sponsored"
    COMMUNITY = "community"
    NOT_LISTED = "not_listed"
    PRIVATE = "private"
    NOT_ASKED = "not_asked"
    NO_ANSWER = "no_answer"

    @property
    def is_fact(self) -> bool:
        """Whether Docker Hub, or the name, says it."""
        return self in _FACTS

    @property
    def is_open(self) -> bool:
        """Whether a fact may be known later."""
        return self in (Badge.NOT_ASKED, Badge.NO_ANSWER)


_FACTS = frozenset({Badge.OFFICIAL, Badge.VERIFIED_PUBLISHER, Badge.SPONSORED, Badge.COMMUNITY})


# The source of what this cache asked for itself; what a bundle brought has the bundle as its source.
DOCKER_HUB = "Docker Hub"


@dataclass(frozen=True, slots=True)
class RepositoryFacts:
    """What `source` said about a repository at the Unix time `asked_at`.

    `source` is `Docker Hub`, or the bundle that carried the facts here.
    """

    badge: Badge
    publisher: str = ""
    description: str = ""
    stars: int = 0
    pulls: int = 0
    is_archived: bool = False
    asked_at: float = 0.0
    source: str = DOCKER_HUB


@dataclass(frozen=True, slots=True)
class ContentAge:
    """Since when the content exists, in Unix seconds, and where that is known from.

    `is_first_sight` means that the cache sees the image for the first time now, so that `since` says
    nothing about its age.
    """

    since: float
    source: str
    is_first_sight: bool = False


FIRST_SEEN = "first seen here"
PUSHED = f"pushed, says {DOCKER_HUB}"


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known about one manifest of a repository.

    `name` is `UPSTREAM/REPOSITORY`, `tag` the tag that was asked for, None by digest. `has_badges`
    says whether its registry is one about which Docker Hub's facts can be had. `age` is None if a
    rule without `min_age` judges.
    """

    name: str
    tag: str | None
    badge: Badge = Badge.NOT_ASKED
    has_badges: bool = False
    age: ContentAge | None = None
    is_ripe: bool = False


def is_official(name: str) -> bool:
    """Tell whether `UPSTREAM/REPOSITORY` is one of Docker Hub's official images, by its name."""
    return name.startswith(OFFICIAL_GLOB_PREFIX) and "/" not in name[len(OFFICIAL_GLOB_PREFIX) :]
