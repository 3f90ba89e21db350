"""The document `pullcache.facts.json` of a bundle: what is known about its images. Does no I/O.

With it a cache without a network can apply its policies to what it imports: facts about repositories, and
since when their images exist. It is believed as far as the bundle is: see docs/security.md, "Content".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from proxy.errors import BundleError, InvalidDigestError, InvalidTagError
from proxy.oci.digest import Digest
from proxy.oci.layout import FACTS_FILE
from proxy.oci.reference import Tag, parse_tag
from proxy.policy.facts import Badge, RepositoryFacts, is_official

# Characters of a description or of the name of a publisher.
MAX_TEXT_LENGTH = 1000

_VERSION = 1

_Text = Annotated[str, Meta(max_length=MAX_TEXT_LENGTH, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Count = Annotated[int, Meta(ge=0, le=1 << 53)]
_Time = Annotated[float, Meta(ge=0, le=1e11)]


@dataclass(frozen=True, slots=True)
class ImageAge:
    """Since when an image exists, in Unix time, and whether it was old enough for a policy once.

    `tag` is None for an image that was exported by its digest.
    """

    digest: Digest
    tag: Tag | None
    first_seen: float
    pushed_at: float | None
    is_ripe: bool


@dataclass(frozen=True, slots=True)
class BundledRepository:
    """What a bundle says about a repository, given as `UPSTREAM/REPOSITORY`, and its images."""

    name: str
    facts: RepositoryFacts | None
    ages: Sequence[ImageAge]


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """What a bundle says, and the Unix time when it was made."""

    made_at: float
    repositories: Sequence[BundledRepository]


class _FactsEntry(msgspec.Struct, omit_defaults=True):
    badge: Badge
    asked: _Time
    publisher: _Text = ""
    description: _Text = ""
    stars: _Count = 0
    pulls: _Count = 0
    archived: bool = False


class _ImageEntry(msgspec.Struct, omit_defaults=True):
    digest: str
    first_seen: _Time
    tag: str | None = None
    pushed: _Time | None = None
    ripe: bool = False


class _RepositoryEntry(msgspec.Struct, omit_defaults=True):
    name: str
    facts: _FactsEntry | None = None
    images: list[_ImageEntry] = []


class _Document(msgspec.Struct):
    version: int
    made: _Time
    repositories: list[_RepositoryEntry]


def encode_facts(facts: BundleFacts) -> bytes:
    """Return `pullcache.facts.json`."""
    repositories = [
        _RepositoryEntry(
            one.name,
            _to_facts_entry(one.facts) if one.facts else None,
            [
                _ImageEntry(
                    str(age.digest),
                    age.first_seen,
                    age.tag and str(age.tag),
                    age.pushed_at,
                    age.is_ripe,
                )
                for age in one.ages
            ],
        )
        for one in facts.repositories
    ]
    return msgspec.json.encode(_Document(_VERSION, facts.made_at, repositories))


def parse_facts(content: bytes) -> BundleFacts:
    """Return what `pullcache.facts.json` says.

    Raises `BundleError` if it is malformed, or says what cannot be.
    """
    try:
        document = msgspec.json.decode(content, type=_Document)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{FACTS_FILE} is invalid: {str(error)[:100]}") from error
    if document.version != _VERSION:
        raise BundleError(
            f"{FACTS_FILE} has version {document.version}, this pullcache reads {_VERSION}: "
            "export it with the same version, or without --facts"
        )
    names = {one.name for one in document.repositories}
    if len(names) < len(document.repositories):
        raise BundleError(f"{FACTS_FILE} names a repository twice")
    return BundleFacts(document.made, [_parse_repository(one) for one in document.repositories])


def _parse_repository(entry: _RepositoryEntry) -> BundledRepository:
    facts = None
    if entry.facts:
        if not entry.facts.badge.is_fact:
            raise BundleError(
                f"{FACTS_FILE} is invalid: {entry.facts.badge.value} is no fact about a repository"
            )
        if entry.facts.badge is Badge.OFFICIAL and not is_official(entry.name):
            raise BundleError(
                f"{FACTS_FILE} calls {entry.name[:100]} official, "
                "but official images are those of docker.io/library"
            )
        facts = RepositoryFacts(
            entry.facts.badge,
            entry.facts.publisher,
            entry.facts.description,
            entry.facts.stars,
            entry.facts.pulls,
            entry.facts.archived,
            entry.facts.asked,
        )
    return BundledRepository(entry.name, facts, [_parse_age(one) for one in entry.images])


def _parse_age(entry: _ImageEntry) -> ImageAge:
    try:
        digest = Digest.parse(entry.digest)
        tag = None if entry.tag is None else parse_tag(entry.tag)
    except (InvalidDigestError, InvalidTagError) as error:
        raise BundleError(f"{FACTS_FILE} is invalid: {error}"[:200]) from error
    return ImageAge(digest, tag, entry.first_seen, entry.pushed, entry.ripe)


def _to_facts_entry(facts: RepositoryFacts) -> _FactsEntry:
    return _FactsEntry(
        facts.badge,
        facts.asked_at,
        facts.publisher,
        facts.description,
        facts.stars,
        facts.pulls,
        facts.is_archived,
    )
